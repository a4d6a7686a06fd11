"""Part `sharing`: does alignment tell how far a table can be compressed, or which ids may share?

The rows of one table of a trained model are replaced by the centroids of K-means, one for eight ids
that were seen, and the loss of each validation example is compared with that before.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from benchmarks.alignment.embedding_measures import NEIGHBOURS, cka, mean_of, shown
from benchmarks.alignment.embedding_plot import Axes, Line, draw
from benchmarks.alignment.embedding_runs import Data, TableRun, cell_of, counts_of, trained
from benchmarks.alignment.parts import Part, Record
from cce_torchrec.kmeans.lloyd import kmeans

IDS_A_ROW = 8
MOST = 8192
"""Ids among whom neighbours are looked for."""
FEWEST = 2
"""Validation examples an id, of which its loss is taken."""
_RUNS = 3
_POINTS = 6
"""Of which a rank correlation is taken."""
PREDICTORS = ("agreement", "distance", "examples")


@dataclass(frozen=True)
class SharingCell:
    """Full tables of three runs on one kind of data; each run is compared with the next."""

    dataset: str
    data: Data

    @property
    def key(self) -> str:
        """See `Cell`."""
        return (
            f"sharing|{self.dataset}|share={self.data.share:g}|flipped={self.data.flipped:g}|"
            f"version=1"
        )

    def measure(self) -> Record:
        """See `Cell`."""
        runs = [
            trained(cell_of(self.dataset, "full", "none", number), self.data, number)
            for number in range(_RUNS)
        ]
        vectors = [run.vectors for run in runs]
        counts = counts_of(self.dataset, self.data)
        tables: dict[str, Any] = {}
        for name, own in counts.items():
            seen = own.nonzero()[:, 0]
            found = []
            for number, run in enumerate(runs):
                other = vectors[(number + 1) % _RUNS]
                found.append(_of_table(run, vectors[number], other[name], name, own))
            tables[name] = {
                "examples": round(float(own[seen].double().mean()), 2),
                "seen": len(seen),
                **{key: [one[key] for one in found] for key in found[0]},
            }
        return {
            "on": self.dataset,
            "share": self.data.share,
            "flipped": self.data.flipped,
            "tables": tables,
        }


def _of_table(
    run: TableRun,
    vectors: dict[str, torch.Tensor],
    other: torch.Tensor,
    name: str,
    counts: torch.Tensor,
) -> dict[str, Any]:
    own = vectors[name]
    seen = counts.nonzero()[:, 0]
    found = kmeans(own[seen], max(2, len(seen) // IDS_A_ROW), 10)
    shared = own.clone()
    shared[seen] = found.centroids[found.assignment]
    increase = losses(run, {**vectors, name: shared}) - losses(run, vectors)
    column = list(run.dataset.features).index(name)
    ids = run.dataset.validation.ids[:, column]
    times = torch.bincount(ids, minlength=len(own))
    total = torch.zeros(len(own), dtype=torch.float64).index_add_(0, ids, increase.double())
    g = torch.Generator().manual_seed(0)
    some = seen[torch.randperm(len(seen), generator=g)[:MOST]]
    agreement = torch.zeros(len(own))
    agreement[some] = agreements(own[some], other[some])
    known = some[times[some] >= FEWEST]
    columns = {
        "agreement": agreement[known],
        "distance": (own - shared)[known].norm(dim=1),
        "examples": counts[known],
    }
    harm = (total[known] / times[known]).numpy()
    predictors = {key: value.double().numpy() for key, value in columns.items()}
    return {
        "increase": round(float(increase.double().mean()), 6),
        "cka": cka(own[seen], other[seen]),
        "agreement_mean": round(float(agreement[some].mean()), 4),
        "ids": len(known),
        # Of each predictor: alone, and beside the others.
        "alone": [_rounded(rank_correlation(harm, predictors[key])) for key in PREDICTORS],
        "beside": [
            _rounded(partial_correlation(harm, predictors[key], _others(predictors, key)))
            for key in PREDICTORS
        ],
    }


@torch.no_grad()
def losses(run: TableRun, vectors: dict[str, torch.Tensor]) -> torch.Tensor:
    """Log loss [n] of each validation example, with these vectors for the compressed tables."""
    rows = run.dataset.validation
    weight = torch.cat([vectors[name] for name in run.tables.names])
    ids, count = run.ids_of(rows), len(run.compressed)
    out = []
    run.network.eval()
    for dense, some, labels in zip(
        rows.dense.split(8192), ids.split(8192), rows.labels.split(8192), strict=True
    ):
        embeddings = weight[some[:, :count]]
        if run.other_tables is not None:
            others = run.other_tables.lookup(some[:, count:], False)
            embeddings = torch.cat([embeddings, others], dim=1)
        logits = run.network(dense, embeddings)
        out.append(binary_cross_entropy_with_logits(logits, labels, reduction="none"))
    run.network.train()
    return torch.cat(out)


def agreements(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Of each id, the share of its nearest in x that are among its nearest in y, [n]."""
    out = []
    k = min(NEIGHBOURS, len(x) - 1)
    for at in torch.arange(len(x)).split(1024):
        near = []
        for side in (x, y):
            distances = torch.cdist(side[at], side)
            distances[torch.arange(len(at)), at] = torch.inf
            near.append(distances.topk(k, largest=False).indices)
        out.append((near[0][:, :, None] == near[1][:, None, :]).any(2).float().mean(1))
    return torch.cat(out)


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks [n], the mean of their ranks for equal values."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[inverse]


def rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's rank correlation; NaN of constant values."""
    return partial_correlation(x, y, [])


def partial_correlation(x: np.ndarray, y: np.ndarray, given: Sequence[np.ndarray]) -> float:
    """Rank correlation of what the ranks of `given` do not tell of the ranks of x and of y."""
    if len(x) < _POINTS:
        return float("nan")
    base = np.stack([np.ones(len(x)), *map(ranks, given)], axis=1)
    left, right = (
        ranks(side) - base @ np.linalg.lstsq(base, ranks(side), rcond=None)[0] for side in (x, y)
    )
    norms = np.linalg.norm(left) * np.linalg.norm(right)
    # Of constant values rounding is left.
    return float(left @ right / norms) if norms > 1e-9 * len(x) ** 3 else float("nan")


def _others(predictors: dict[str, np.ndarray], key: str) -> list[np.ndarray]:
    return [value for name, value in predictors.items() if name != key]


def _rounded(value: float) -> float | None:
    return None if np.isnan(value) else round(value, 4)


def _cells(quick: bool) -> list[SharingCell]:
    if quick:
        return [SharingCell("ml-1m", Data(share=0.1))]
    changed = [Data(), *(Data(share=share) for share in (0.05, 0.1, 0.25, 0.5))]
    changed += [Data(flipped=flipped) for flipped in (0.1, 0.3)]
    small = [SharingCell(on, data) for on in ("flights", "ml-1m") for data in changed]
    return [*small, SharingCell("gowalla", Data()), SharingCell("gowalla", Data(share=0.25))]


def _tables(records: Sequence[Record]) -> list[str]:
    out = [
        "| data | examples used | labels flipped | table | examples an id | loss increase | CKA "
        "| neighbours shared |",
        "| --- " * 8 + "|",
    ]
    for one in records:
        for name, table in one["tables"].items():
            known = [value for value in table["cka"] if value is not None]
            row = [
                one["on"], f"{one['share']:.0%}", f"{one['flipped']:.0%}", name,
                f"{table['examples']:.1f}", shown(mean_of(table["increase"]), 4),
                shown(mean_of(known)) if known else "", shown(mean_of(table["agreement_mean"])),
            ]  # fmt: skip
            out.append(f"| {' | '.join(row)} |")
    return out


def _points(records: Sequence[Record]) -> list[tuple[str, float, float, float, float]]:
    """Of each table and kind of data: where, its increase of loss, CKA, agreement, examples."""
    return [
        (
            one["on"],
            statistics.fmean(table["increase"]),
            statistics.fmean(table["cka"]),
            statistics.fmean(table["agreement_mean"]),
            table["examples"],
        )
        for one in records
        for table in one["tables"].values()
        if None not in table["cka"]
    ]


def _interval(columns: list[np.ndarray]) -> str:
    """Rank correlation of the first two columns given the others, with a bootstrap over rows."""
    own = partial_correlation(columns[0], columns[1], columns[2:])
    g = np.random.default_rng(0)
    drawn = [g.integers(0, len(columns[0]), len(columns[0])) for _ in range(2000)]
    found = [partial_correlation(c[0][at], c[1][at], [o[at] for o in c[2:]])
             for c in [columns] for at in drawn]  # fmt: skip
    low, high = np.nanquantile(found, [0.025, 0.975])
    return f"{own:.2f} ({low:.2f} to {high:.2f})"


def _tells_of_tables(records: Sequence[Record]) -> list[str]:
    points = _points(records)
    out = [
        "| tables of | points | CKA | agreement of neighbours | examples an id "
        "| agreement, given examples |",
        "| --- " * 6 + "|",
    ]
    for on in [*dict.fromkeys(point[0] for point in points), "all"]:
        own = [point[1:] for point in points if on in (point[0], "all")]
        if len(own) < 10:
            continue
        harm, aligned, near, examples = map(np.array, zip(*own, strict=True))
        row = [on, str(len(own)), *(_interval([harm, one]) for one in (aligned, near, examples)),
               _interval([harm, near, examples])]  # fmt: skip
        out.append(f"| {' | '.join(row)} |")
    return out


def _tells_of_ids(records: Sequence[Record]) -> list[str]:
    out = [
        "| data | table | ids | " + " | ".join(PREDICTORS)
        + " | " + " | ".join(f"{key}, given the others" for key in PREDICTORS) + " |",
        "| --- " * (3 + 2 * len(PREDICTORS)) + "|",
    ]  # fmt: skip
    for one in records:
        if one["share"] != 1 or one["flipped"]:
            continue
        for name, table in one["tables"].items():
            row = [one["on"], name, f"{min(table['ids']):,}"]
            for kind in ("alone", "beside"):
                for at in range(len(PREDICTORS)):
                    values = [run[at] for run in table[kind] if run[at] is not None]
                    row.append(shown(mean_of(values), 2) if len(values) > 1 else "")
            out.append(f"| {' | '.join(row)} |")
    return out


def _lines(records: Sequence[Record]) -> list[str]:
    return [
        f"Full tables of which one has a row for {IDS_A_ROW} ids, by K-means: by how much the "
        "validation loss is higher, and how far the table agrees with that of another seed. "
        f"± half of a 95 % interval over {_RUNS} runs.",
        "",
        *_tables(records),
        "",
        "Rank correlation with the increase of loss over tables and kinds of data, with 95 % "
        "intervals of a bootstrap over these points:",
        "",
        *_tells_of_tables(records),
        "",
        f"Rank correlation, over ids with {FEWEST} validation examples or more, with the increase "
        "of an id's own loss: agreement of its neighbours with those of another seed, distance of "
        "its vector to the shared row, and its training examples.",
        "",
        *_tells_of_ids(records),
    ]


def _draw(records: Sequence[Record], file: Path) -> None:
    points = _points(records)
    panels = []
    for label, at in (("debiased CKA", 1), ("neighbours shared", 2), ("examples an id", 3)):
        lines = []
        for on in dict.fromkeys(point[0] for point in points):
            own = [point[1:] for point in points if point[0] == on]
            lines.append(Line(on, [point[at] for point in own], [point[0] for point in own]))
        panels.append(Axes(f"{IDS_A_ROW} ids a row", label, "increase of loss", lines, at == 3))
    draw([panel for panel in panels if panel.lines], file)


PART = Part(
    name="sharing",
    title="What alignment tells of compression",
    cells=_cells,
    lines=_lines,
    draw=_draw,
)
