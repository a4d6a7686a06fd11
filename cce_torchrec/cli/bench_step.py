"""`cce-torchrec bench step`: what a training step costs here, plain and compressed."""

from __future__ import annotations

from typing import Any

import click

from cce_torchrec.cli.files import JSON_FILE, write_json

_COUNT = click.IntRange(1)


@click.command(
    epilog="Example: cce-torchrec bench step --num-embeddings 10000000 --bag 4 --json step.json"
)
@click.option(
    "--num-embeddings",
    type=_COUNT,
    default=1_000_000,
    show_default=True,
    help="ids of a table; the plain one is allocated, ids times dimension times 4 bytes",
)
@click.option("--embedding-dim", type=_COUNT, default=64, show_default=True, help="values of each")
@click.option(
    "--num-rows", type=_COUNT, default=4096, show_default=True, help="main rows of a chunk"
)
@click.option(
    "--num-helper-rows", type=click.IntRange(0), help="helper rows of a chunk; default 3 x main"
)
@click.option("--num-chunks", type=_COUNT, default=4, show_default=True, help="of an embedding")
@click.option("--tables", type=_COUNT, default=1, show_default=True, help="of this shape")
@click.option("--batch-size", type=_COUNT, default=4096, show_default=True, help="bags a table")
@click.option("--bag", type=_COUNT, default=1, show_default=True, help="ids of a bag")
@click.option(
    "--ids",
    type=click.Choice(["uniform", "zipf"]),
    default="uniform",
    show_default=True,
    help="drawn alike, or the id of rank r by 1 / r",
)
@click.option(
    "--optimizer",
    type=click.Choice(["rowwise_adagrad", "adagrad", "sgd"]),
    default="rowwise_adagrad",
    show_default=True,
    help="of the tables, fused into their backward",
)
@click.option(
    "--repeats", type=_COUNT, default=8, show_default=True, help="turns of each, of 5 steps"
)
@click.option("--threads", type=_COUNT, default=1, show_default=True, help="of torch on a CPU")
@click.option("--json", "json_file", type=JSON_FILE, help="write what was measured there")
def command(repeats: int, threads: int, json_file: str | None, **setting: Any) -> None:
    """Measure a training step of your table, plain and CCE, on this machine.

    Forward, backward and update of tables alone, under DistributedModelParallel on one rank, on the
    GPU if there is one: no network, no data, no clustering. Plain and CCE tables take turns in one
    process; printed are medians of wall-clock time. Bytes are computed.
    """
    from cce_torchrec.train.step_cost import StepSetting, step_cost

    report = step_cost(StepSetting(**setting), repeats=repeats, threads=threads)
    click.echo(str(report))
    if json_file is not None:
        write_json(json_file, report.to_json())
