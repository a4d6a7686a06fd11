"""`python -m benchmarks.compare DIR...`: a table of the runs that wrote summary.json there."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(folders: list[str]) -> None:
    """Prints one row per run."""
    header = ("run", "log loss", "AUC", "parameters", "table bytes", "seconds")
    rows = []
    for folder in map(Path, folders):
        summary = json.loads((folder / "summary.json").read_text())
        rows.append(
            (
                folder.name,
                f"{summary['best_val_log_loss']:.4f}",
                f"{summary['best_val_auc']:.4f}",
                f"{summary['parameters']:,}",
                f"{summary['table_bytes']:,}",
                f"{summary['seconds']:.1f}",
            )
        )
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, *rows]:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


if __name__ == "__main__":
    main(sys.argv[1:])
