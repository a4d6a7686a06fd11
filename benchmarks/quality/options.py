"""The command line of `python -m benchmarks.quality`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from benchmarks.quality.budgets import Budget
from benchmarks.quality.cells import TUNING_SPLITS
from benchmarks.quality.grid import Selection
from benchmarks.quality.methods import METHODS, known
from benchmarks.quality.problems import PROBLEMS

RESULTS = Path(__file__).parents[1] / "results" / "quality"


def parser() -> argparse.ArgumentParser:
    """The options."""
    out = argparse.ArgumentParser(
        prog="python -m benchmarks.quality",
        description="Log loss and AUC of every method at equal bytes and at equal parameters.",
    )
    add = out.add_argument
    add("--datasets", nargs="+", metavar="NAME", help=", ".join(PROBLEMS))
    add("--only", nargs="+", metavar="METHOD", help=", ".join(METHODS))
    add("--budgets", nargs="+", metavar="BUDGET", help="bytes=420000, share=0.05 or ppd=64")
    add(
        "--splits", nargs="+", type=int, help="default 20 to 23, or 0 alone where there is one seed"
    )
    add("--passes", nargs="+", type=int, help="over the data; default all of each data set")
    add("--data", type=Path, help="folder of the files of data sets; default CCE_DATA_DIR")
    add("--jobs", type=int, default=os.cpu_count() or 1, help="cells at once; default the cores")
    add("--results", type=Path, default=RESULTS, help="folder of the finished cells")
    add("--quick", action="store_true", help="a small part of the grid, at most 15 minutes")
    add("--table", action="store_true", help="only print tables and write curves of what is there")
    add("--estimate", action="store_true", help="only say how long what is missing would take")
    return out


def selection(args: argparse.Namespace) -> Selection:
    """What part of the grid `args` asks for.

    Raises:
        ValueError: an unknown name, with the nearest known one.
    """
    if args.quick:
        return QUICK
    if args.jobs < 1:
        raise ValueError(f"--jobs {args.jobs} must be 1 or more")
    splits = args.splits or ()
    tuning = set(TUNING_SPLITS) & set(splits)
    if tuning:
        raise ValueError(f"--splits {min(tuning)} chooses rates and is not reported; give others")
    datasets = [known(name, list(PROBLEMS), "data set") for name in args.datasets or PROBLEMS]
    every = sorted({b for n in PROBLEMS for b in PROBLEMS[n].budgets})
    budgets = [known(str(Budget.parse(b)), every, "budget") for b in args.budgets or ()]
    return Selection(
        datasets=datasets,
        methods=[known(name, list(METHODS), "method") for name in args.only or METHODS],
        budgets=budgets,
        splits=tuple(splits),
        passes=tuple(args.passes or ()),
    )


QUICK = Selection(
    datasets=("flights",),
    methods=("full", "hash", "CE", "CE restarted"),
    budgets=("bytes=420000",),
    splits=(0, 1),
    passes=(2,),
)
"""The part of the grid that --quick computes."""
