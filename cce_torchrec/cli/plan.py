"""`cce-torchrec plan`: what tables will take, before there is a model or a machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from cce_torchrec.byte_sizes import said_bytes
from cce_torchrec.cli.files import JSON_FILE, write_json, write_text
from cce_torchrec.cli.units import BYTES

if TYPE_CHECKING:  # neither help nor completion needs torch
    from torchrec.modules.embedding_configs import EmbeddingBagConfig

_OF_FILES = (".yaml", ".yml", ".json")
_GPU_MEMORY = 80 * 10**9


@click.command(
    epilog="Example: cce-torchrec plan tables.yaml --world-size 8 --memory 40GB --device cuda --fit"
)
@click.argument("source")
@click.option("--world-size", type=click.IntRange(1), default=1, show_default=True, help="ranks")
@click.option(
    "--memory",
    type=BYTES,
    help="of each rank, such as 40GB or 512MiB, of which 15 % are left to other things than tables;"
    " default 80GB for cuda, TorchRec's 128 GiB for cpu",
)
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    default=512,
    show_default=True,
    help="examples of a step on all ranks, by which times are estimated",
)
@click.option(
    "--optimizer",
    type=click.Choice(["rowwise_adagrad", "adagrad", "adam", "sgd"]),
    default="rowwise_adagrad",
    show_default=True,
    help="of the tables, whose state counts",
)
@click.option(
    "--plan",
    "kind",
    type=click.Choice(["tw", "cw", "rw", "auto"]),
    default="auto",
    show_default=True,
    help="tables whole, chunks spread, codes spread by ids, or what fits each table",
)
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="of the ranks; no GPU has to be there",
)
@click.option(
    "--fit",
    is_flag=True,
    help="compress plain tables of 1 MiB or more, all by one ratio, until the plan fits --memory; "
    "off by default",
)
@click.option(
    "--num-chunks",
    type=click.IntRange(1),
    default=4,
    show_default=True,
    help="most chunks of a table that --fit compresses",
)
@click.option(
    "--yaml",
    "yaml_file",
    type=click.Path(dir_okay=False),
    help="write the tables there, as plan reads them; after --fit as they were made",
)
@click.option("--json", "json_file", type=JSON_FILE, help="write all of it there, in bytes")
def command(
    *,
    source: str,
    world_size: int,
    memory: int | None,
    batch_size: int,
    optimizer: str,
    kind: str,
    device: str,
    fit: bool,
    num_chunks: int,
    yaml_file: str | None,
    json_file: str | None,
) -> None:
    """Say what tables take, and where they would be, before a GPU is booked.

    SOURCE is a file of tables (.yaml, .yml or .json), or a checkpoint of this package: a folder or
    the URI of an object store. Tables may be of any size: nothing of them is allocated.

    A file has a list of tables, and may have `common` keys of all of them. A table has name,
    num_embeddings, embedding_dim and feature_names (by default its name); with one of num_rows,
    params_per_dim and table_bytes it is a CCE table, otherwise a plain one. Further keys are
    num_chunks, num_helper_rows, helper_ratio, recipe, examples_per_id, data_type, pooling, seed,
    hash_ids, learned_codes, track_seen, track_counts, id_ranges and rotate_chunks.

    \b
    common: {embedding_dim: 64}
    tables:
      - {name: user, num_embeddings: 100_000_000, table_bytes: 600MB}
      - {name: country, num_embeddings: 250}
    """
    if fit and memory is None:
        raise click.UsageError("--fit compresses tables until they fit --memory; give it")
    if memory is None and device == "cuda":
        memory = _GPU_MEMORY
    import torch

    from cce_torchrec.planning.fit_to_memory import tables_for_memory
    from cce_torchrec.planning.outlook import OPTIMIZERS, outlook
    from cce_torchrec.planning.table_file import tables_yaml
    from cce_torchrec.versions import installed_versions

    tables, where = _tables(source), torch.device(device)
    # Some twenty plans are made, which for a thousand tables take a minute.
    if fit and memory is not None:
        click.echo(f"finding the largest tables that fit {said_bytes(memory)} a rank", err=True)
        tables = tables_for_memory(
            tables,
            memory,
            world_size,
            device=where,
            kind=kind,
            batch_size=batch_size,
            optimizer=OPTIMIZERS[optimizer],
            num_chunks=num_chunks,
        )
    found = outlook(
        tables,
        world_size=world_size,
        device=where,
        memory_bytes=memory,
        batch_size=batch_size,
        optimizer=optimizer,
        kind=kind,
    )
    click.echo(str(found))
    if yaml_file is not None:
        write_text(yaml_file, tables_yaml(tables))
    if json_file is not None:
        said: dict[str, Any] = {"source": source, **found.to_json()}
        write_json(json_file, said | {"versions": installed_versions()})


def _tables(source: str) -> list[EmbeddingBagConfig]:
    """Of a file or of a checkpoint."""
    if source.endswith(_OF_FILES):
        from cce_torchrec.planning.table_file import read_tables

        return read_tables(source)
    from cce_torchrec.checkpoint.rebuilt import bag_tables

    return bag_tables(source)
