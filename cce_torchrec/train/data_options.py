"""The options of the training program that say what a user's own files hold."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from cce_torchrec.data.table_options import CRITEO_COLUMNS, IDS, TableOptions

DATASETS = ("table", "criteo")
"""Data sets that are streamed from files."""
_OF_COLUMNS = ("label", "dense", "categorical", "sequence")
_OF_FILES = ("ids", "hash_size", "validation", "validation_fraction", "shuffle_rows", "compressed",
             "vocabulary")  # fmt: skip
FREE = ("validation", "vocabulary")
"""May differ in a run that is resumed: places of files, whose content is compared."""


def add_options(add: Callable[..., None]) -> None:
    """Gives a parser the options, by its `add_argument`, all of which are None unless given."""
    add("--label", help="column of 0 and 1 (table)")
    add("--dense", help="columns of numbers, A,B (table)")
    add("--categorical", help="columns of ids, integers or text, A,B (table)")
    add("--sequence", help="columns of lists of ids, pooled by their sum, A,B (table)")
    add(
        "--ids",
        choices=IDS,
        help="auto: integers as they are, text by a vocabulary; or both by one, or both hashed",
    )
    add("--hash-size", type=int, help="ids of each feature with --ids hash; default 1000000")
    add("--validation", help="file or folder of rows that validate; default a fraction of --data")
    add("--validation-fraction", type=float, help="default 0.1")
    add("--shuffle-rows", type=int, help="rows in memory to shuffle, of a rank; default 524288")
    add("--compressed", help="columns whose tables are compressed; default from 1,000 ids on")
    add("--vocabulary", help="folder that keeps vocabulary and counts; default --out")


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the program where options of files are missing, or would be ignored."""
    given = [name for name in _OF_COLUMNS + _OF_FILES if getattr(args, name) is not None]
    # An option that nothing reads would leave the user with another run than was asked for.
    ignored = [name for name in given if args.dataset != "table" and name in _OF_COLUMNS]
    if args.dataset not in DATASETS:
        ignored = given
    if ignored:
        names = ", ".join("--" + name.replace("_", "-") for name in ignored)
        parser.error(f"{names}: --dataset {args.dataset} has columns of its own; leave it out")
    if args.dataset in DATASETS and args.data is None:
        parser.error(f"--dataset {args.dataset} is in files; give --data a file or a folder")
    if args.dataset == "table":
        if args.label is None:
            parser.error("--dataset table: --label names the column of 0 and 1")
        if args.categorical is None and args.sequence is None:
            parser.error("--dataset table: --categorical or --sequence names the columns of ids")
    if args.dataset in DATASETS:
        try:
            table_options(args)
        except ValueError as error:
            parser.error(str(error))


def table_options(args: argparse.Namespace, folder: Any = None) -> TableOptions | None:
    """What the options say about files; None for data sets that have a reader of their own.

    Args:
        folder: keeps the vocabulary.
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
