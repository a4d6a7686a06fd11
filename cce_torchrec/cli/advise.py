"""`cce-torchrec advise`: what to make of the tables of a data set."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cce_torchrec.cli.files import JSON_FILE, write_json, write_text
from cce_torchrec.cli.units import BYTES
from cce_torchrec.train import data_options
from cce_torchrec.train.parameters import SETTINGS

if TYPE_CHECKING:  # it takes seconds, which --help has not
    import torch

_SHARED = ("model", "dataset", "data", *(str(one.name) for one in data_options.PARAMS),
           "split_seed", "embedding_dim")  # fmt: skip
"""Options of the training program that say the same here."""
_HELP = {
    "model": "network over the tables; gmf multiplies two features, whose tables stay apart",
    "vocabulary": "folder that keeps vocabulary and counts; default nowhere",
    "compressed": "columns with compressed tables, A,B; not read here",
}


def _shared() -> list[click.Parameter]:
    by_name = {str(parameter.name): parameter for parameter in SETTINGS}
    out: list[click.Parameter] = []
    for name in _SHARED:
        # A copy, as the training program's says something else of some.
        own = copy.copy(by_name[name])
        if isinstance(own, click.Option):
            own.help = _HELP.get(name, own.help)
        out.append(own)
    return out


def _advise(
    table_bytes: int | None,
    loss_increase: float | None,
    num_chunks: int | None,
    min_bytes: int,
    full_tables: tuple[str, ...],
    json_file: str | None,
    yaml_file: str | None,
    **data: Any,
) -> None:
    """Say what to make of the tables of a data set.

    Counts how often ids occur in one pass of the training part of a data set, and says for each
    feature whether its table is best left whole, compressed or joined with others, what it takes,
    and what that cost on the public data set whose ids are as frequent. Rules from measurements: no
    replacement for a run of your own.
    """
    if (table_bytes is None) == (loss_increase is None):
        raise click.UsageError("give one of --table-bytes and --loss-increase")
    args = argparse.Namespace(**data, resume=False)
    data_options.check(args)
    from cce_torchrec.data import load
    from cce_torchrec.planning import advise, id_counts
    from cce_torchrec.planning.table_file import tables_yaml

    # None of what the program's users call compressed: that is what is asked for here.
    table = data_options.table_options(args, folder=args.vocabulary)
    examples = load(args.dataset, args.data, args.model, args.split_seed, table)
    weights = _weights(full_tables, examples.features)
    advice = advise(
        id_counts(examples),
        embedding_dim=args.embedding_dim,
        table_bytes=table_bytes,
        loss_increase=loss_increase,
        multiplies=args.model == "gmf",
        min_bytes=min_bytes,
        num_chunks=num_chunks,
        weights=weights,
    )
    click.echo(str(advice))
    if yaml_file is not None:
        write_text(yaml_file, tables_yaml(advice.configs))  # type: ignore[arg-type]  # of bags
        click.echo(f"wrote {Path(yaml_file)}: cce-torchrec plan {yaml_file}")
    if json_file is not None:
        write_json(
            json_file,
            {
                "dataset": examples.name,
                "tables": [asdict(one) for one in advice.tables],
                "bytes": advice.bytes,
                "expected_increase": advice.expected_increase,
                "rests_on": advice.rests_on,
            },
        )


def _weights(asked: Sequence[str], features: Collection[str]) -> dict[str, torch.Tensor]:
    """Trained full tables, by feature, from texts FEATURE=PATH.

    Raises:
        ValueError: another form, an unknown feature, or a file that has no such table.
    """
    import numpy as np
    import torch

    from cce_torchrec.checkpoint.full_table import full_table

    out = {}
    for text in asked:
        feature, sign, path = text.partition("=")
        if not sign or not path or feature not in features or feature in out:
            raise ValueError(
                f"--full-table {text}: give FEATURE=PATH, each of the features {list(features)} "
                "once at most"
            )
        weight = full_table(path, feature)
        out[feature] = (
            torch.tensor(np.asarray(weight)) if isinstance(weight, np.ndarray) else weight
        )
    return out


command = click.Command(
    "advise",
    params=[
        *_shared(),
        click.Option(
            ["--table-bytes"],
            type=BYTES,
            help="for all compressed tables, codes counted, such as 500MB; or --loss-increase",
        ),
        click.Option(
            ["--loss-increase"],
            type=click.FloatRange(min=0, min_open=True),
            help="log loss that may be added, from which bytes follow; or --table-bytes",
        ),
        click.Option(
            ["--num-chunks"],
            type=click.IntRange(1),
            help="most chunks of a table; default 4, or 8 of rare ids, which have no codes",
        ),
        click.Option(
            ["--min-bytes"],
            type=BYTES,
            default=1 << 20,
            show_default=True,
            help="of a table that is compressed",
        ),
        click.Option(
            ["--full-table", "full_tables"],
            multiple=True,
            metavar="FEATURE=PATH",
            help="trained full table of a feature, in a file (.npy, .safetensors, .pt) or a "
            "checkpoint: says what centroids keep of it; several times",
        ),
        click.Option(["--json", "json_file"], type=JSON_FILE, help="write what was found there"),
        click.Option(
            ["--yaml", "yaml_file"],
            type=click.Path(dir_okay=False),
            help="write the tables there, as plan reads them",
        ),
    ],
    help=_advise.__doc__,
    epilog="Example: cce-torchrec advise --dataset table --data clicks.parquet --label click "
    "--categorical user,item --table-bytes 2MB --yaml tables.yaml",
    callback=_advise,
)
