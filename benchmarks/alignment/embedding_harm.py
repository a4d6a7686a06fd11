"""Part `harm`: which ids share a row without harm, judged on examples that no run has seen.

Four full tables are trained, two on each half of the examples, of which a share is left out. There
the loss of each id is compared with that where K-means gives eight ids a row. Observed labels are
few for an id, so that the harm by them is mostly noise, and no predictor can correlate with it by
more than the square root of its reliability. Expected harm is the Kullback-Leibler divergence
between the predictions: by how much the loss would rise if the labels had the chances that the
model gives them.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

from benchmarks.alignment.embedding_measures import mean_of, shown
from benchmarks.alignment.embedding_plot import Axes, Line, draw
from benchmarks.alignment.embedding_runs import SPLIT, Data, TableRun, cell_of, trained
from benchmarks.alignment.embedding_sharing import (
    IDS_A_ROW,
    MOST,
    agreements,
    partial_correlation,
)
from benchmarks.alignment.parts import Part, Record
from benchmarks.quality.training import dataset_of
from cce_torchrec.data import Rows
from cce_torchrec.kmeans.lloyd import kmeans

RUNS = 4
JUDGED_FROM = 8
"""Unused examples an id."""
DATASETS = ("flights", "ml-1m", "gowalla")
PREDICTORS = ("same half", "other half", "distance", "examples")
GIVEN = {
    "same half": ("distance", "examples"),
    "other half": ("distance", "examples"),
    "distance": ("examples",),
    "examples": ("distance",),
}
HARMS = ("observed", "expected")


@dataclass(frozen=True)
class HarmCell:
    """Four full tables, even runs on one half of the examples and odd ones on the other."""

    dataset: str
    share: float = 0.7
    """Of each half that is trained on."""

    @property
    def key(self) -> str:
        """See `Cell`."""
        return f"harm|{self.dataset}|share={self.share:g}|runs={RUNS}|version=1"

    def measure(self) -> Record:
        """See `Cell`."""
        data = Data(share=self.share, halves=True)
        runs = [
            trained(cell_of(self.dataset, "full", "none", number), data, number)
            for number in range(RUNS)
        ]
        rows = unused(self.dataset, self.share)
        tables = {
            name: _summary([_of_run(runs, number, name, rows) for number in range(RUNS)])
            for name in runs[0].tables.names
        }
        return {
            "on": self.dataset,
            "unused": len(rows),
            "log_loss": [round(min(point[1] for point in run.curve), 5) for run in runs],
            "tables": {name: table for name, table in tables.items() if table},
        }


def unused(dataset: str, share: float) -> Rows:
    """The training examples that `Data` leaves out of both halves at this share."""
    train = dataset_of(dataset, SPLIT).train
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(1))
    halves = order[0::2], order[1::2]
    return train.take(torch.cat([half[round(share * len(half)) :] for half in halves]))


@torch.no_grad()
def logits_of(run: TableRun, vectors: dict[str, torch.Tensor], rows: Rows) -> torch.Tensor:
    """Logits [n], with these vectors for the compressed tables."""
    weight = torch.cat([vectors[name] for name in run.tables.names])
    ids, count, out = run.ids_of(rows), len(run.compressed), []
    run.network.eval()
    for dense, some in zip(rows.dense.split(8192), ids.split(8192), strict=True):
        embeddings = weight[some[:, :count]]
        if run.other_tables is not None:
            others = run.other_tables.lookup(some[:, count:], False)
            embeddings = torch.cat([embeddings, others], dim=1)
        out.append(run.network(dense, embeddings))
    run.network.train()
    return torch.cat(out)


def harms(before: torch.Tensor, after: torch.Tensor, labels: torch.Tensor) -> list[torch.Tensor]:
    """Increase of each example's log loss: by its label, and by the chances of `before`, [n]."""
    own, shared = before.double(), after.double()
    losses = [
        binary_cross_entropy_with_logits(one, labels.double(), reduction="none")
        for one in (own, shared)
    ]
    chance = own.sigmoid()
    expected = chance * (logsigmoid(own) - logsigmoid(shared))
    expected += (1 - chance) * (logsigmoid(-own) - logsigmoid(-shared))
    return [losses[1] - losses[0], expected]


def per_id(values: torch.Tensor, ids: torch.Tensor, size: int) -> torch.Tensor:
    """The mean [size] of the values of each id; 0 of none."""
    total = torch.zeros(size, dtype=torch.float64).index_add_(0, ids, values)
    return total / torch.bincount(ids, minlength=size).clamp(min=1)


def reliability(values: torch.Tensor, ids: torch.Tensor, judged: torch.Tensor) -> float:
    """Spearman and Brown's, of an id's mean, from two halves of its examples.

    Args:
        values: of examples, [n].
        ids: of examples, [n].
        judged: the ids of which it is taken, with two examples or more.
    """
    # Every other example of an id, so that both halves have some of each.
    order = torch.argsort(ids, stable=True)
    halves = [
        per_id(values[at], ids[at], int(ids.max()) + 1)[judged].numpy()
        for at in (order[0::2], order[1::2])
    ]
    own = partial_correlation(halves[0], halves[1], [])
    return 2 * own / (1 + own)


def _of_run(runs: Sequence[TableRun], number: int, name: str, rows: Rows) -> dict[str, Any] | None:
    """Figures of a table of a run; None where hardly an id has examples enough."""
    run = runs[number]
    own, train = run.vectors[name], run.dataset.train
    column = list(run.dataset.features).index(name)
    counts = torch.bincount(train.ids[:, column], minlength=len(own))
    seen = counts.nonzero()[:, 0]
    found = kmeans(own[seen], max(2, len(seen) // IDS_A_ROW), 10)
    shared = own.clone()
    shared[seen] = found.centroids[found.assignment.long()]
    pair = [logits_of(run, tables, rows) for tables in (run.vectors, {**run.vectors, name: shared})]
    ids = rows.ids[:, column]
    some = seen[torch.randperm(len(seen), generator=torch.Generator().manual_seed(0))[:MOST]]
    judged = some[torch.bincount(ids, minlength=len(own))[some] >= JUDGED_FROM]
    if len(judged) < 100:
        return None
    predictors = {"distance": (own - shared).norm(dim=1), "examples": counts}
    for key, away in (("same half", 2), ("other half", 1)):
        other = runs[(number + away) % RUNS].vectors[name]
        predictors[key] = torch.zeros(len(own))
        predictors[key][some] = agreements(own[some], other[some])

    columns = {key: value[judged].double().numpy() for key, value in predictors.items()}
    out: dict[str, Any] = {"ids": len(judged)}
    for kind, values in zip(HARMS, harms(pair[0], pair[1], rows.labels), strict=True):
        harm = per_id(values, ids, len(own))[judged].numpy()
        out[kind] = [
            float(values.mean()),
            reliability(values, ids, judged),
            *(partial_correlation(harm, columns[key], []) for key in PREDICTORS),
            *(
                partial_correlation(harm, columns[key], [columns[one] for one in GIVEN[key]])
                for key in PREDICTORS
            ),
        ]
    return out


def _summary(runs: Sequence[dict[str, Any] | None]) -> dict[str, Any]:
    """Means over runs and half their 95 % intervals, in the order of `_of_run`."""
    known = [run for run in runs if run is not None]
    if len(known) < RUNS:
        return {}
    out: dict[str, Any] = {"ids": min(run["ids"] for run in known)}
    for kind in HARMS:
        columns = zip(*(run[kind] for run in known), strict=True)
        out[kind] = [[float(f"{v:.3g}") for v in mean_of(values)] for values in columns]
    return out


def _cells(quick: bool) -> list[HarmCell]:
    return [HarmCell("ml-1m", 0.1)] if quick else [HarmCell(on) for on in DATASETS]


def _row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _lines(records: Sequence[Record]) -> list[str]:
    names = ("agreement, same half", "agreement, other half", "distance", "examples")
    given = [f"{n}, given {' and '.join(GIVEN[k])}" for n, k in zip(names, PREDICTORS, strict=True)]
    out = [
        f"Rank correlation over ids with the harm of one row for {IDS_A_ROW} ids, on examples that "
        f"no run has seen, {JUDGED_FROM} or more an id; ± half of a 95 % interval over {RUNS} "
        "runs.",
        "",
        _row("data", "table", "ids", "harm", "mean", "reliability", *names, *given),
        _row(*["---"] * 14),
    ]
    for one in records:
        for name, table in one["tables"].items():
            for kind in HARMS:
                (mean, half), *found = table[kind]
                out.append(
                    _row(one["on"], name, f"{table['ids']:,}", kind, shown((mean, half), 5),
                         *(shown((m, h), 2) for m, h in found))
                )  # fmt: skip
    return [*out, "", *_said(records)]


def _said(records: Sequence[Record]) -> list[str]:
    """Where agreement tells more of the harm than distance and examples do, by its intervals."""
    out = []
    for kind in HARMS:
        for at, key in enumerate(PREDICTORS[:2]):
            pairs = [
                (f"{one['on']} {name}", *table[kind][2 + len(PREDICTORS) + at])
                for one in records
                for name, table in one["tables"].items()
            ]
            if not pairs:
                continue
            less = [where for where, mean, half in pairs if mean < -half]
            more = [where for where, mean, half in pairs if mean > half]
            largest = max(abs(mean) for _, mean, _ in pairs if not math.isnan(mean))
            out.append(
                f"- {kind} harm, agreement with a run on the {key}, given distance and examples: "
                f"ids that agree suffer less in {len(less)} of {len(pairs)} tables"
                f"{_named(less)}, more in {len(more)}{_named(more)}; the largest correlation is "
                f"{largest:.2f}, the mean {statistics.fmean(mean for _, mean, _ in pairs):+.3f}."
            )
    return out


def _named(where: Sequence[str]) -> str:
    return f" ({', '.join(where)})" if where else ""


def _draw(records: Sequence[Record], file: Path) -> None:
    panels = []
    for kind in HARMS:
        lines = []
        for at, key in enumerate(PREDICTORS):
            found = [t[kind][2 + at] for one in records for t in one["tables"].values()]
            if found:
                means, halves = zip(*found, strict=True)
                lines.append(Line(key, list(np.arange(len(found)) + at / 10), means, halves))
        panels.append(Axes(f"{kind} harm", "table", "rank correlation", lines))
    draw([panel for panel in panels if panel.lines], file)


PART = Part(
    name="harm",
    title="Which ids share a row without harm",
    cells=_cells,
    lines=_lines,
    draw=_draw,
)
