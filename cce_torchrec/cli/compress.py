"""`cce-torchrec compress`: a plain job's checkpoint with its large tables compressed."""

from __future__ import annotations

from pathlib import Path

import click

from cce_torchrec.byte_sizes import said_bytes
from cce_torchrec.cli.files import JSON_FILE, write_json
from cce_torchrec.cli.tables import read_as, reading_options
from cce_torchrec.cli.units import BYTES

BUDGETS = ("table_bytes", "compression", "num_rows")


@click.command(
    epilog="Example: cce-torchrec compress plain.pt compressed --compression 20 --table user "
    "--table item"
)
@click.argument("source")
@click.argument("out")
@click.option(
    "--table",
    "tables",
    multiple=True,
    metavar="NAME",
    help="to compress, several times; default all of --min-bytes or more",
)
@click.option(
    "--min-bytes",
    type=BYTES,
    default=1 << 20,
    show_default=True,
    help="of a table that is compressed if none is named",
)
@click.option(
    "--table-bytes",
    type=BYTES,
    help="for all compressed tables together, codes counted, such as 500MB; one of the budgets",
)
@click.option(
    "--compression",
    type=click.FloatRange(min=1, min_open=True),
    help="full over compressed bytes of each table; one of the budgets; default 20",
)
@click.option(
    "--num-rows",
    type=click.IntRange(2),
    help="codebook rows of each chunk, 256 of which have codes of 8 bits; one of the budgets",
)
@click.option(
    "--num-chunks",
    type=click.IntRange(1),
    help="of each table; default those with the least error on a sample of the ids",
)
@click.option(
    "--max-rows",
    type=click.IntRange(2),
    default=1024,
    show_default=True,
    help="of a chunk, where they follow from bytes; time grows with their square",
)
@click.option(
    "--prefix",
    help="of the model's keys in SOURCE, such as 'model.'; default that of the nested dictionary "
    "with tables",
)
@click.option("--step", type=click.IntRange(0), default=0, show_default=True, help="that OUT has")
@click.option(
    "--scratch",
    type=click.Path(file_okay=False, exists=True),
    help="folder with room for the largest table, into which one of a folder is read; default "
    "beside OUT",
)
@reading_options("none, as a state dict does not say")
@click.option("--json", "json_file", type=JSON_FILE, help="write what became of tables there")
def command(
    *,
    source: str,
    out: str,
    tables: tuple[str, ...],
    min_bytes: int,
    table_bytes: int | None,
    compression: float | None,
    num_rows: int | None,
    num_chunks: int | None,
    max_rows: int,
    prefix: str | None,
    step: int,
    scratch: str | None,
    features: tuple[tuple[str, str], ...],
    pooling: tuple[tuple[str, str], ...],
    weighted: bool | None,
    json_file: str | None,
) -> None:
    """Make a CCE checkpoint of a plain TorchRec one.

    SOURCE is what a plain job has saved: a file of torch.save or .safetensors with a state dict, a
    folder of torch.distributed.checkpoint, or a checkpoint of this package without CCE tables.

    OUT becomes a folder of checkpoints of this package, with the whole job in it: compressed
    tables, plain ones, and every other tensor of the model as it was. Your program loads it, on any
    number of ranks, by two lines: `compress_like(model, OUT)` where the model was built, and
    `load_checkpoint(OUT, model)` where it is sharded. `export` writes it for serving. An OUT that
    ends in .pt becomes a file of torch.save with the state dict instead, for an unsharded model.

    A table becomes product quantised: codebooks and codes without helper rows, as `finalize` leaves
    them. It can be served, or trained on, which moves rows and leaves codes. Optimizer state is
    left out.
    """
    # Each says how many rows a table gets: of two one would be ignored.
    given = [name for name in BUDGETS if click.get_current_context().params[name] is not None]
    if len(given) > 1:
        first, second = ("--" + name.replace("_", "-") for name in given[:2])
        raise click.UsageError(f"{first} and {second} both say how large tables become; give one")
    if not given:
        compression = 20.0
    from cce_torchrec.checkpoint.compressed_job import CompressedJob, refuse_existing
    from cce_torchrec.checkpoint.compressed_table import Budget
    from cce_torchrec.checkpoint.location import store_of
    from cce_torchrec.checkpoint.plain_source import PlainSource

    # Before minutes of K-means, which a name that is taken would throw away.
    path = refuse_existing(out)
    job_source = PlainSource(source, prefix)
    if job_source.prefix:
        click.echo(f"the model is what is under {job_source.prefix!r} in {source}")
    job = CompressedJob(
        job_source,
        tables=tables or None,
        min_bytes=min_bytes,
        budget=Budget(
            table_bytes=table_bytes,
            compression=compression,
            num_rows=num_rows,
            num_chunks=num_chunks,
            most_rows=max_rows,
        ),
        read_as=read_as(features, pooling, weighted),
    )
    beside = Path(scratch or (path.absolute().parent if store_of(path) is None else "."))
    beside.mkdir(parents=True, exist_ok=True)
    made = job.run(beside)
    for table in made:
        click.echo(str(table))
    before, after = (sum(getattr(t, name) for t in made) for name in ("bytes_before", "bytes"))
    click.echo(
        f"all tables: {said_bytes(after)} instead of {said_bytes(before)} ({before / after:.1f} "
        "times)"
    )
    if job_source.left_out:
        click.echo(f"left out, as they are no tensors: {', '.join(job_source.left_out[:5])}")
    written = job.save(path, step=step)
    click.echo(f"wrote {written}")
    if json_file is not None:
        write_json(json_file, {"source": source, "out": str(written),
                               "tables": [table.to_json() for table in made]})  # fmt: skip
