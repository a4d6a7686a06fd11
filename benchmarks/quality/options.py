"""The command line of `python -m benchmarks.quality`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from benchmarks.quality.budgets import Budget
from benchmarks.quality.cells import TUNING_SPLITS
from benchmarks.quality.grid import Selection
from benchmarks.quality.methods import METHODS, known
from benchmarks.quality.own_data import OWN, add_options
from benchmarks.quality.problems import PROBLEMS, Problem

OWN_RESULTS = Path("runs/quality")
RESULTS = Path(__file__).parents[1] / "results" / "quality"


def parser() -> argparse.ArgumentParser:
    """The options."""
    out = argparse.ArgumentParser(
        prog="python -m benchmarks.quality",
        description="Log loss and AUC of every method at equal bytes and at equal parameters.",
    )
    add = out.add_argument
    names = ", ".join([*PROBLEMS, *OWN])
    add("--datasets", "--dataset", nargs="+", metavar="NAME", help=f"{names}; default the grid's")
    add("--only", nargs="+", metavar="METHOD", help=", ".join(map(repr, METHODS)))
    add("--budgets", nargs="+", metavar="BUDGET", help="bytes=420000, share=0.05 or ppd=64")
    add(
        "--splits", nargs="+", type=int, help="default 20 to 23, or 0 alone where there is one seed"
    )
    add("--passes", nargs="+", type=int, help="over the data; default all of each data set")
    add("--data", type=Path, help="folder of data sets, default CCE_DATA_DIR; or your own files")
    add("--jobs", type=int, default=os.cpu_count() or 1, help="cells at once; default the cores")
    add(
        "--results",
        type=Path,
        help="folder of the finished cells; default benchmarks/results/quality, of your own files "
        f"{OWN_RESULTS}",
    )
    add("--quick", action="store_true", help="a small part of the grid, at most 15 minutes")
    add("--table", action="store_true", help="only print tables and write curves of what is there")
    add("--estimate", action="store_true", help="only say how long what is missing would take")
    add_options(out)
    return out


def selection(args: argparse.Namespace, own: Problem | None = None) -> Selection:
    """What part of the grid `args` asks for.

    Args:
        own: the problem of the user's own files, if that is asked for.

    Raises:
        ValueError: an unknown name, with the nearest known one, or what the grid has not.
    """
    if args.jobs < 1:
        raise ValueError(f"--jobs {args.jobs} must be 1 or more")
    if own is None and args.data is not None and not args.data.is_dir():
        raise ValueError(f"--data {args.data} is no folder of data sets; give the one they are in")
    if args.results is not None and args.results.exists() and not args.results.is_dir():
        raise ValueError(f"--results {args.results} is no folder; give another one")
    if args.quick:
        given = [n for n in ("datasets", "only", "budgets", "splits", "passes") if getattr(args, n)]
        if given:
            raise ValueError(f"--quick is a part of the grid by itself; leave out --{given[0]}")
        return QUICK
    _check_splits(args.splits or ())
    names = [own.name] if own else args.datasets or list(PROBLEMS)
    datasets = [known(name, list(PROBLEMS), "data set") for name in names]
    problems = [PROBLEMS[name] for name in datasets]
    budgets = [str(Budget.parse(b)) for b in args.budgets or ()]
    if "none" in budgets:
        raise ValueError("--budgets none: full tables have no budget; they are --only full")
    for budget in budgets:
        known(budget, sorted({b for p in problems for b in p.budgets}), "budget")
    for passes in args.passes or ():
        there = sorted({n for p in problems for n in p.passes})
        known(str(passes), list(map(str, there)), "number of passes")
    return Selection(
        datasets=datasets,
        methods=[known(name, list(METHODS), "method") for name in args.only or METHODS],
        budgets=budgets,
        splits=tuple(args.splits or ()),
        passes=tuple(args.passes or ()),
    )


def _check_splits(splits: Sequence[int]) -> None:
    tuning = set(TUNING_SPLITS) & set(splits)
    if tuning:
        raise ValueError(f"--splits {min(tuning)} chooses rates and is not reported; give others")
    if min(splits, default=0) < 0 or len(set(splits)) < len(splits):
        raise ValueError(f"--splits {list(splits)}: give different numbers, 0 or more")


QUICK = Selection(
    datasets=("flights",),
    methods=("full", "hash", "CE", "CE restarted"),
    budgets=("bytes=420000",),
    splits=(0, 1),
    passes=(2,),
)
"""The part of the grid that --quick computes."""
