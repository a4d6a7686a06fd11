"""The options of the training program that say what a user's own files hold."""

from __future__ import annotations

import argparse
from typing import Any

import click

from cce_torchrec.data.table_options import CRITEO_COLUMNS, IDS, TableOptions
from cce_torchrec.train.option import option

DATASETS = ("table", "criteo")
"""Data sets that are streamed from files."""
_OF_COLUMNS = ("label", "dense", "categorical", "sequence")
_OF_FILES = ("ids", "hash_size", "validation", "validation_fraction", "shuffle_rows", "compressed",
             "vocabulary")  # fmt: skip
FREE = ("validation", "vocabulary")
"""May differ in a run that is resumed: places of files, whose content is compared."""
PARAMS = [
    option("--label", help="column of 0 and 1 (table)"),
    option("--dense", help="columns of numbers, A,B (table)"),
    option("--categorical", help="columns of ids, integers or text, A,B (table)"),
    option("--sequence", help="columns of lists of ids, pooled by their sum, A,B (table)"),
    option(
        "--ids",
        type=click.Choice(IDS),
        help="auto: integers as they are, text by a vocabulary; or both by one, or both hashed; "
        "default auto",
    ),
    option("--hash-size", type=int, help="ids of each feature with --ids hash; default 1000000"),
    option("--validation", help="file or folder of rows that validate; default some of --data"),
    option("--validation-fraction", type=float, help="part of the rows of --data; default 0.1"),
    option("--shuffle-rows", type=int, help="rows in memory of a rank; default 524288"),
    option("--compressed", help="columns with compressed tables, A,B; default of 1,000 ids on"),
    option("--vocabulary", help="folder that keeps vocabulary and counts; default --out"),
]
"""All of them None unless given: the defaults are those of `TableOptions`."""


def check(args: argparse.Namespace) -> None:
    """Refuses options of files that are missing, or would be ignored.

    Raises:
        click.UsageError: naming them.
    """
    given = [name for name in _OF_COLUMNS + _OF_FILES if getattr(args, name) is not None]
    # An option that nothing reads would leave the user with another run than was asked for.
    ignored = [name for name in given if args.dataset != "table" and name in _OF_COLUMNS]
    if args.dataset not in DATASETS:
        ignored = given
    if ignored:
        names = ", ".join("--" + name.replace("_", "-") for name in ignored)
        raise click.UsageError(
            f"{names}: --dataset {args.dataset} has columns of its own; leave it out"
        )
    if args.dataset in DATASETS and args.data is None:
        raise click.UsageError(
            f"--dataset {args.dataset} is in files; give --data a file or a folder"
        )
    if args.dataset == "table":
        if args.label is None:
            raise click.UsageError("--dataset table: --label names the column of 0 and 1")
        if args.categorical is None and args.sequence is None:
            raise click.UsageError(
                "--dataset table: --categorical or --sequence names the columns of ids"
            )
    if args.dataset in DATASETS:
        _check_table(args)


def _check_table(args: argparse.Namespace) -> None:
    if args.validation is not None and args.validation_fraction is not None:
        raise click.UsageError(
            "--validation-fraction is of the rows of --data, and those of --validation validate; "
            "give one of them"
        )
    if args.hash_size is not None and args.ids != "hash":
        raise click.UsageError(
            f"--hash-size {args.hash_size}: no ids are hashed; give --ids hash, or leave it out"
        )
    try:
        table_options(args)
    except ValueError as error:
        raise click.UsageError(str(error)) from error


def table_options(
    args: argparse.Namespace, folder: Any = None, earlier: Any = None
) -> TableOptions | None:
    """What the options say about files; None for data sets that have a reader of their own.

    Args:
        folder: keeps the vocabulary.
        earlier: that of the run from which this one goes on.
    """
    if args.dataset not in DATASETS:
        return None
    given: dict[str, Any] = {
        name: getattr(args, name) for name in _OF_FILES if getattr(args, name) is not None
    }
    # Options that are not given keep the defaults of `TableOptions`, which are stated once.
    given["compressed"] = _names(given.get("compressed"))
    given.pop("vocabulary", None)
    given |= {"folder": folder, "split_seed": args.split_seed, "resumes": args.resume}
    given["earlier"] = earlier
    if args.dataset == "criteo":
        return criteo_options(**given)
    return TableOptions(
        label=args.label,
        dense=_names(args.dense),
        categorical=_names(args.categorical),
        sequences=_names(args.sequence),
        **given,
    )


def of_two(args: argparse.Namespace) -> bool:
    """Whether the options name two features of a table, which can be multiplied."""
    return args.dataset == "table" and len(_names(args.categorical) + _names(args.sequence)) == 2


def criteo_options(**others: Any) -> TableOptions:
    """Options for Criteo's own files: Kaggle's train.txt, or day_0 .. day_23 of the terabyte."""
    return TableOptions(
        label=CRITEO_COLUMNS[0],
        dense=CRITEO_COLUMNS[1:14],
        categorical=CRITEO_COLUMNS[14:],
        log_dense=True,
        text_columns=CRITEO_COLUMNS,
        **{"ids": "vocabulary", **others},
    )


def _names(given: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in given.split(",") if name.strip()) if given else ()
