"""`python -m benchmarks.quality`: log loss of every method at equal bytes or parameters.

See benchmarks/README.md.
"""

from __future__ import annotations

import os
import sys

from benchmarks.quality import options
from benchmarks.quality.curves import write_curves
from benchmarks.quality.estimate import estimate
from benchmarks.quality.grid import Selection, groups
from benchmarks.quality.own_data import own_problem
from benchmarks.quality.problems import PROBLEMS
from benchmarks.quality.running import run
from benchmarks.quality.store import Store
from benchmarks.quality.summary import rows_of, unreproduced
from benchmarks.quality.table import markdown


def main() -> None:
    """Computes the missing cells, then prints the tables."""
    args = options.parser().parse_args()
    try:
        own = own_problem(args)
        if own is not None:
            PROBLEMS[own.name] = own
        elif args.data:
            os.environ["CCE_DATA_DIR"] = str(args.data)  # processes of cells read it too
        args.results = args.results or (options.OWN_RESULTS if own else options.RESULTS)
        selection = options.selection(args, own)
        store = Store(args.results)
        asked = groups(selection)
        if args.estimate:
            print(estimate(asked, store.records, selection.splits, args.jobs))
            return
        if not args.table:
            run(store, asked, selection.splits, args.jobs, own)
        rows = rows_of(asked, store.records, selection.splits)
        # Whether a rival is reproduced does not depend on what is asked for.
        every = groups(Selection())
        print(markdown(rows, unreproduced(rows_of(every, store.records, ()))))
        write_curves(rows, args.results)
    except ValueError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(f"interrupted; finished cells are in {args.results}, and a rerun goes on")


if __name__ == "__main__":
    main()
