"""`cce-torchrec export`: the tables of a checkpoint for serving, without the model's code."""

from __future__ import annotations

import logging

import click

from cce_torchrec.byte_sizes import said_bytes
from cce_torchrec.cli.tables import read_as, reading_options

FORMS = ("folder", "torchscript", "program", "package", "onnx", "vectors")


@click.command(epilog="Example: cce-torchrec export runs/last exports/items --data-type int8")
@click.argument("checkpoint")
@click.argument("out", type=click.Path())
@click.option(
    "--format",
    "form",
    type=click.Choice(FORMS),
    help="default by OUT: a folder, torchscript of .pt, package of .pt2, onnx, or vectors",
)
@click.option(
    "--data-type",
    type=click.Choice(["fp32", "fp16", "int8", "int4"]),
    help="of codebook rows and plain tables; default int8, of vectors fp32",
)
@click.option("--collection", help="path of the collection in the model; default the only one")
@click.option("--feature", help="whose vectors are written; default the only one")
@click.option(
    "--ignores",
    is_flag=True,
    help="read ids out of bounds as id 0; by default they are refused",
)
@reading_options("what the checkpoint says")
@click.option(
    "--check/--no-check",
    default=True,
    show_default=True,
    help="compare 64 ids of each feature with the checkpoint, and remove what differs",
)
def command(
    *,
    checkpoint: str,
    out: str,
    form: str | None,
    data_type: str | None,
    collection: str | None,
    feature: str | None,
    ignores: bool,
    features: tuple[tuple[str, str], ...],
    pooling: tuple[tuple[str, str], ...],
    weighted: bool | None,
    check: bool,
) -> None:
    """Write a trained model's tables for serving.

    CHECKPOINT is a folder of a job, whose latest checkpoint is taken, or of one checkpoint, local
    or the URI of an object store; finalized or not. Its tables are made anew, so that no code of
    the model is needed; the network beside them is not exported.

    \b
    folder       what load_inference maps; processes share its memory
    torchscript  a .pt of torch.jit, for Python and C++
    package      a .pt2 that AOTInductor compiles (a C++ compiler, some 10 seconds)
    program      a .pt2 of torch.export.save
    onnx         for ONNX Runtime
    vectors      float32 of all ids of one feature, .npy or .parquet, for retrieval

    All but folder and vectors take tensors: ids feature by feature in the order that is printed,
    and lengths of their bags. Checkpoints of before features were saved need --features and, for
    means and weights, --pooling and --weighted.
    """
    from cce_torchrec.inference.from_checkpoint import export_checkpoint

    # That optimizer state is not taken over is what an export is.
    logging.getLogger("cce_torchrec.checkpoint.load").setLevel(logging.ERROR)
    said = export_checkpoint(
        checkpoint,
        out,
        form=form,
        data_type=data_type,
        collection=collection,
        feature=feature,
        ignores=ignores,
        read_as=read_as(features, pooling, weighted),
        check=check,
    )
    click.echo(
        f"wrote {said.path}: {said.form} of collection {said.collection!r}, rows of "
        f"{said.data_type}, {said_bytes(said.bytes)}"
    )
    # Who serves tensors without names has to know it.
    click.echo(f"features, in the order of ids: {', '.join(said.features)}")
    if said.compared:
        click.echo(said.compared)
