"""A table in the user's own files as a problem of the benchmark."""

from __future__ import annotations

import argparse
import re
import zlib
from dataclasses import dataclass, replace

import click

from benchmarks.quality.budgets import Budget
from benchmarks.quality.cells import FINAL_SPLITS, TUNING_SPLITS
from benchmarks.quality.problems import Problem
from cce_torchrec.data import Dataset, TableOptions
from cce_torchrec.train import data_options

OWN = data_options.DATASETS
"""Names of data sets that are files with columns which the options name."""
SHARES = (5, 20, 80)
"""Budgets, where none are given: the bytes of the full tables over these."""
BATCH = {"dlrm": 256, "gmf": 4096}
DIM = {"dlrm": 16, "gmf": 32}


@dataclass(frozen=True)
class OwnData:
    """Reads the files, and holds all rows in memory, for each split anew."""

    path: str
    options: TableOptions

    def __call__(self, split: int) -> Dataset:
        options = replace(self.options, split_seed=split)
        if split in TUNING_SPLITS:
            # Rows of a file that validate are in reported figures: rates are chosen by others.
            options = replace(options, validation=None)
        from cce_torchrec.data.table import TableDataset

        return TableDataset(self.path, options).in_memory()

    @property
    def checksum(self) -> int:
        """Of the content of the files, and of what is read of them."""
        from cce_torchrec.data.table_files import open_table

        paths = [self.path, *filter(None, [self.options.validation])]
        files = [open_table(path, self.options, 0.5).prints() for path in paths]
        own = replace(self.options, validation=None)
        return zlib.crc32(repr((files, own)).encode())


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that say what the files hold, as those of the training program."""
    group = parser.add_argument_group(f"files of your own (--dataset {' or '.join(OWN)})")
    for name, what in [
        ("--label", "column of 0 and 1"),
        ("--dense", "columns of numbers, A,B"),
        ("--categorical", "columns of ids, A,B"),
        ("--sequence", "columns of lists of ids, pooled by their sum, A,B"),
        ("--ids", "auto, vocabulary or hash"),
        ("--validation", "file or folder of rows that validate; default some of --data"),
        ("--compressed", "columns with compressed tables, A,B; default of 1,000 ids on"),
    ]:
        group.add_argument(name, help=what)
    group.add_argument("--hash-size", type=int, help="ids of each feature with --ids hash")
    group.add_argument("--validation-fraction", type=float, help="of the rows; default 0.1")
    group.add_argument("--model", choices=list(BATCH), help="network above the tables; dlrm")
    group.add_argument("--embedding-dim", type=int, help="default 16, of gmf 32")
    group.add_argument("--batch-size", type=int, help="default 256, of gmf 4096")


def own_problem(args: argparse.Namespace) -> Problem | None:
    """What the options say of files of one's own; None where they ask for other data sets.

    Raises:
        ValueError: what is wrong with the options, or with the files.
    """
    asked = [name for name in args.datasets or () if name in OWN]
    if asked and len(args.datasets) > 1:
        raise ValueError(f"--datasets {' '.join(args.datasets)}: {asked[0]} is run by itself")
    args.dataset = asked[0] if asked else "of the benchmark"
    args.split_seed, args.resume, args.shuffle_rows, args.vocabulary = 0, False, None, None
    try:
        data_options.check(args)
        options = data_options.table_options(args)
    except click.UsageError as error:
        raise ValueError(error.message) from error
    given = [n for n in ("model", "embedding_dim", "batch_size") if getattr(args, n) is not None]
    if options is None:
        if given:
            name = given[0].replace("_", "-")
            raise ValueError(f"--{name} is for --dataset {' or '.join(OWN)}; leave it out")
        return None
    return _problem(args, OwnData(str(args.data), options))


def _problem(args: argparse.Namespace, data: OwnData) -> Problem:
    model = args.model or "dlrm"
    if model == "gmf" and len(data.options.features) != 2:
        raise ValueError(
            f"--model gmf multiplies two features, and {list(data.options.features)} are named"
        )
    dim, batch = args.embedding_dim or DIM[model], args.batch_size or BATCH[model]
    for name, value in (("embedding-dim", args.embedding_dim), ("batch-size", args.batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value} must be 1 or more")
    # Once before any process starts: what is wrong with the files is said at once.
    dataset = data(FINAL_SPLITS[0])
    if not dataset.compressed:
        raise ValueError(
            f"{data.path}: no feature has 1,000 ids, and none is compressed ({dataset.features}); "
            "name some by --compressed"
        )
    budgets = tuple(str(Budget.parse(b)) for b in args.budgets or _budgets(dataset, dim))
    passes = tuple(args.passes or (1,))
    if min(passes) < 1:
        raise ValueError(f"--passes {min(passes)} must be 1 or more")
    return Problem(
        name="own-" + re.sub(r"[^\w.-]", "_", dataset.name),
        load=data,
        model=model,
        dim=dim,
        batch=batch,
        passes=passes,
        budgets=budgets,
        other_budgets=budgets,
        version=zlib.crc32(f"{data.checksum} {model} {dim} {batch}".encode()),
    )


def _budgets(dataset: Dataset, dim: int) -> list[str]:
    full = sum(dataset.features[name] for name in dataset.compressed) * dim * 4
    return [f"bytes={float(f'{full // share:.1e}'):.0f}" for share in SHARES]
