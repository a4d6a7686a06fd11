"""`python -m benchmarks.recipes [--quick] [--json FILE]`: trained or clustered main rows, by data.

Which recipe ids want that have few examples: parts of MovieLens-1M and of Gowalla, down to two
examples an id, and flights. Both recipes count and shrink, have the rows that follow from the bytes
of the table, and the better of two rates, on splits that are in no reported figure.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean

import torch
from tqdm import tqdm

from benchmarks.machine import device_name
from benchmarks.quality.cells import Cell, Group
from benchmarks.quality.embedder import Embedder
from benchmarks.quality.methods.clustered import by_budget
from benchmarks.quality.methods.shared import SHARED, built
from benchmarks.quality.problems import PROBLEMS
from benchmarks.quality.training import Run
from cce_torchrec.data import Dataset
from cce_torchrec.versions import installed_versions

RATES = (0.03, 0.1)
RECIPES = ("frequent", "rare")


@dataclass(frozen=True)
class Setting:
    """A part of a data set, and how long it is trained."""

    dataset: str
    budgets: tuple[str, ...]
    share: float
    """Of the training examples."""
    passes: int

    def of(self, dataset: Dataset) -> Dataset:
        """What is trained on."""
        count = len(dataset.train)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
        kept = order[: round(self.share * count)].sort().values
        return replace(dataset, train=dataset.train.take(kept))


ML_1M = ("bytes=300000", "bytes=104000")
GOWALLA = ("bytes=2000000", "bytes=700000")
FLIGHTS = ("bytes=880000", "bytes=420000", "bytes=200000")
SETTINGS = [
    *(Setting("ml-1m", ML_1M, share, 10) for share in (0.5, 0.25, 0.1, 0.05, 0.02)),
    *(Setting("ml-1m", ML_1M, share, 2) for share in (0.25, 0.1)),
    *(Setting("gowalla", GOWALLA, share, 5) for share in (0.25, 0.1)),
    Setting("flights", FLIGHTS, 1.0, 2),
]


class ForcedRun(Run):
    """A run by a recipe, whatever the examples of its ids."""

    def __init__(self, cell: Cell, setting: Setting, recipe: str) -> None:
        self._setting, self._recipe = setting, recipe
        super().__init__(cell)

    def data(self) -> Dataset:
        """See `Run`."""
        return self._setting.of(super().data())

    def built(self) -> Embedder:
        """See `Run`; apart under GMF, and one table under DLRM, whatever the recipe."""
        form = "" if self.tables.model == "gmf" else SHARED
        return built(partial(by_budget, recipe=self._recipe), replace(self.tables, form=form))


def measured(setting: Setting, budget: str, recipe: str) -> dict[str, float]:
    """Log loss by rate, the mean over the splits on which rates are chosen."""
    problem = PROBLEMS[setting.dataset]
    group = Group(setting.dataset, setting.passes, f"recipe {recipe}", "1", budget)
    out = {}
    for rate in RATES:
        losses = []
        for split in problem.tuning_splits:
            run = ForcedRun(Cell(group, split, split, "adagrad", rate), setting, recipe)
            run.train()
            losses.append(min(loss for _, loss, _ in run.curve))
        out[f"{rate:g}"] = fmean(losses)
    return out


def main() -> None:
    """Trains all, prints the table and writes --json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="folder with the data sets; default CCE_DATA_DIR")
    parser.add_argument("--quick", action="store_true", help="the smallest part alone")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.data:
        os.environ["CCE_DATA_DIR"] = args.data
    torch.set_num_threads(1)
    settings = [s for s in SETTINGS if s.share < 0.05] if args.quick else SETTINGS
    cells = [(s, budget, recipe) for s in settings for budget in s.budgets for recipe in RECIPES]
    losses = {cell: measured(*cell) for cell in tqdm(cells)}
    rows = []
    print("| data | share | passes | budget | frequent | rare |")
    print("| --- | --- | --- | --- | --- | --- |")
    for setting, budget in dict.fromkeys((s, budget) for s, budget, _ in cells):
        found = {recipe: losses[setting, budget, recipe] for recipe in RECIPES}
        best = " | ".join(f"{min(found[recipe].values()):.4f}" for recipe in RECIPES)
        print(f"| {setting.dataset} | {setting.share:.0%} | {setting.passes} | {budget} | {best} |")
        rows.append({**asdict(setting), "budgets": [budget], "log_loss": found})
    if args.json:
        result = {
            "device": device_name(torch.device("cpu")),
            "versions": installed_versions(),
            "splits": {s.dataset: PROBLEMS[s.dataset].tuning_splits for s in settings},
            "rows": rows,
        }
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
