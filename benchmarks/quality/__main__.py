"""`python -m benchmarks.quality`: see benchmarks/README.md."""

from __future__ import annotations

import os
import sys

from benchmarks.quality import options
from benchmarks.quality.grid import groups
from benchmarks.quality.running import run
from benchmarks.quality.store import Store


def main() -> None:
    """Computes the missing cells, then prints the tables."""
    args = options.parser().parse_args()
    if args.data:
        os.environ["CCE_DATA_DIR"] = str(args.data)  # processes of cells read it too
    try:
        selection = options.selection(args)
        store = Store(args.results)
        run(store, groups(selection), selection.splits, args.jobs)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
