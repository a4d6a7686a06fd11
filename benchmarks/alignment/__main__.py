"""`python -m benchmarks.alignment`: how runs agree, and what it tells.

See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from benchmarks.alignment.running import records_of

RESULTS = Path(__file__).parents[1] / "results" / "alignment"


def main() -> None:
    """Computes the missing cells of each part, then prints its tables and draws its plot."""
    from benchmarks.alignment.all_parts import PARTS

    out = argparse.ArgumentParser(
        prog="python -m benchmarks.alignment",
        description="Alignment of networks and of embedding tables between runs.",
    )
    add = out.add_argument
    add("--only", nargs="+", choices=list(PARTS), metavar="PART", help=", ".join(PARTS))
    add("--data", type=Path, help="folder of the files of data sets; default CCE_DATA_DIR")
    add("--jobs", type=int, default=os.cpu_count() or 1, help="cells at once; default the cores")
    add("--results", type=Path, default=RESULTS, help="folder of the finished cells")
    add("--quick", action="store_true", help="a small part of the cells, a few minutes")
    add("--table", action="store_true", help="only print and draw what is there")
    args = out.parse_args()
    if args.jobs < 1:
        out.error(f"--jobs {args.jobs} must be 1 or more")
    if args.data:
        os.environ["CCE_DATA_DIR"] = str(args.data)  # processes of cells read it too
    for name in args.only or PARTS:
        part = PARTS[name]
        try:
            found = records_of(part, args.results, args.quick, args.jobs, not args.table)
        except ValueError as error:
            sys.exit(f"error: {error}")
        print("\n".join([f"## {part.title}", "", *part.lines(found), ""]))
        part.draw(found, args.results / f"{name}.png")


if __name__ == "__main__":
    main()
