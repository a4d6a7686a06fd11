"""Part `tables`: runs of one recommender, by method, bytes, data, noise and frequency of ids."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.alignment.embedding_compressible import lines_of as compressible
from benchmarks.alignment.embedding_measures import (
    by_frequency,
    cka,
    of_pairs,
    over_runs,
    shared_neighbours,
    shown,
)
from benchmarks.alignment.embedding_plot import Axes, Line, draw
from benchmarks.alignment.embedding_runs import Data, cell_of, counts_of, trained
from benchmarks.alignment.parts import Part, Record

METHODS = ("full", "hash", "CE", "CCE, frequent recipe", "ours")
CONDITIONED = ("full", "ours")
"""Methods whose data are changed."""
MIDDLE = {"flights": "bytes=420000", "ml-1m": "bytes=104000", "gowalla": "bytes=700000"}
BUDGETS = {
    "flights": ("bytes=420000", "bytes=100000"),
    "ml-1m": ("bytes=300000", "bytes=104000"),
    "gowalla": ("bytes=700000",),
}
RUNS = {"ml-1m": 4, "flights": 4, "gowalla": 3}
SHARES = {
    "flights": (0.1, 0.25, 0.5),
    "ml-1m": (0.05, 0.1, 0.25, 0.5),
    "gowalla": (0.25,),
}
FLIPS = {"flights": (0.1, 0.3), "ml-1m": (0.03, 0.1, 0.3), "gowalla": (0.1,)}


@dataclass(frozen=True)
class TablesCell:
    """Runs of a method on one kind of data, and how their tables agree.

    Runs have seeds of their own. Where labels are flipped they have the same seed, so that the
    noise alone parts them.
    """

    dataset: str
    method: str
    budget: str
    data: Data
    runs: int

    @property
    def key(self) -> str:
        """See `Cell`."""
        data = self.data
        return (
            f"tables|{self.dataset}|{self.method}|{self.budget}|share={data.share:g}|"
            f"flipped={data.flipped:g}|runs={self.runs}|version=1"
        )

    def measure(self) -> Record:
        """See `Cell`."""
        own, vectors = [], []
        for number in range(self.runs):
            seed = 0 if self.data.flipped else number
            run = trained(cell_of(self.dataset, self.method, self.budget, seed), self.data, number)
            own.append(run.curve)
            vectors.append(run.vectors)
        tables: dict[str, Any] = {}
        for name, counts in counts_of(self.dataset, self.data).items():
            seen = counts.nonzero()[:, 0]
            tables[name] = {
                "examples": round(float(counts[seen].double().mean()), 2),
                "seen": len(seen),
                "cka": of_pairs(vectors, name, seen, cka),
                "neighbours": of_pairs(vectors, name, seen, shared_neighbours),
                "bins": by_frequency(vectors, name, counts) if self.data == Data() else [],
            }
        return {
            "on": self.dataset,
            "method": self.method,
            "budget": self.budget,
            "share": self.data.share,
            "flipped": self.data.flipped,
            "runs": self.runs,
            "log_loss": [round(min(point[1] for point in curve), 5) for curve in own],
            "tables": tables,
        }


def _cells(quick: bool) -> list[TablesCell]:
    if quick:
        ml = [("full", "none"), ("ours", MIDDLE["ml-1m"])]
        return [TablesCell("ml-1m", *how, Data(share=0.1), 3) for how in ml]
    return list(_all_cells())


def _all_cells() -> Iterator[TablesCell]:
    for dataset, runs in RUNS.items():
        for method in METHODS:
            budgets = ("none",) if method == "full" else BUDGETS[dataset]
            for budget in budgets:
                yield TablesCell(dataset, method, budget, Data(), runs)
        changed = [Data(share=share) for share in SHARES[dataset]]
        changed += [Data(flipped=flipped) for flipped in FLIPS[dataset]]
        for method in CONDITIONED:
            budget = "none" if method == "full" else MIDDLE[dataset]
            for data in changed:
                yield TablesCell(dataset, method, budget, data, runs)


def over_tables(record: Record, measure: str) -> tuple[float, float]:
    """The mean over tables of a measure, and half of its interval over runs."""
    tables = [one[measure] for one in record["tables"].values() if None not in one[measure]]
    pairs = [statistics.fmean(values) for values in zip(*tables, strict=True)]
    if not pairs:
        return float("nan"), float("nan")
    return over_runs(pairs, record["runs"])


def plain(record: Record) -> bool:
    """Whether the data are unchanged."""
    return record["share"] == 1 and not record["flipped"]


def _methods(records: Sequence[Record]) -> list[str]:
    out = [
        "| data | method | bytes | debiased CKA | neighbours shared | log loss |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for one in records:
        if plain(one):
            cells = [
                one["on"], one["method"], one["budget"].removeprefix("bytes="),
                shown(over_tables(one, "cka")), shown(over_tables(one, "neighbours")),
                f"{statistics.fmean(one['log_loss']):.4f}",
            ]  # fmt: skip
            out.append(f"| {' | '.join(cells)} |")
    return out


def _changed(records: Sequence[Record]) -> list[str]:
    out = [
        "| data | examples used | labels flipped | seeds | full: CKA | neighbours | log loss "
        "| ours: CKA | neighbours | log loss |",
        "| --- " * 10 + "|",
    ]
    by = {(r["on"], r["share"], r["flipped"], r["method"], r["budget"]): r for r in records}
    kinds = dict.fromkeys((r["on"], r["share"], r["flipped"]) for r in records)
    for on, share, flipped in sorted(kinds, key=lambda kind: (kind[0], kind[2], kind[1])):
        pair = (
            by.get((on, share, flipped, "full", "none")),
            by.get((on, share, flipped, "ours", MIDDLE[on])),
        )
        row = [on, f"{share:.0%}", f"{flipped:.0%}", "one" if flipped else "several"]
        for one in pair:
            row += (
                ["", "", ""]
                if one is None
                else [
                    shown(over_tables(one, "cka")),
                    shown(over_tables(one, "neighbours")),
                    f"{statistics.fmean(one['log_loss']):.4f}",
                ]
            )
        out.append(f"| {' | '.join(row)} |")
    return out


def _frequency(records: Sequence[Record]) -> list[str]:
    out = [
        "| data | method | table | examples an id, from | ids | debiased CKA of the bin |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for one in records:
        if not plain(one) or one["budget"] not in ("none", MIDDLE[one["on"]]):
            continue
        if one["method"] not in CONDITIONED:
            continue
        for name, table in one["tables"].items():
            for low, ids, *values in table["bins"]:
                found = shown(over_runs(values, one["runs"]))
                out.append(
                    f"| {one['on']} | {one['method']} | {name} | {low} | {ids:,} | {found} |"
                )
    return out


def _lines(records: Sequence[Record]) -> list[str]:
    return [
        "Means over tables of the ids that training has seen; ± half of a 95 % interval over runs. "
        "The log loss is the lowest of a run, on validation examples.",
        "",
        *_methods(records),
        "",
        *_changed(records),
        "",
        *_frequency(records),
        "",
        *compressible(records, MIDDLE),
    ]


def _line(label: str, points: Sequence[tuple[float, tuple[float, float]]]) -> Line:
    points = sorted(points)
    return Line(label, *zip(*((x, y, half) for x, (y, half) in points), strict=True))


def _draw(records: Sequence[Record], file: Path) -> None:
    panels = []
    for on in RUNS:
        own = [one for one in records if one["on"] == on]
        own = [one for one in own if one["budget"] in ("none", MIDDLE[on])]
        own = [one for one in own if one["method"] in CONDITIONED]
        sizes = [r for r in own if not r["flipped"]]
        noisy = [r for r in own if r["flipped"]]
        panels += [
            _panel(on, "share of the examples", sizes, "share"),
            _panel(on, "labels flipped, one seed", noisy, "flipped"),
            Axes(
                on,
                "examples an id, from",
                "debiased CKA",
                [
                    _line(
                        f"{r['method']}, {name}",
                        [(low, over_runs(values, r["runs"])) for low, _, *values in table["bins"]],
                    )
                    for r in own
                    if plain(r)
                    for name, table in r["tables"].items()
                    if len(table["bins"]) > 1
                ],
                log_x=True,
            ),
        ]
    draw([panel for panel in panels if panel.lines], file)


def _panel(title: str, x_label: str, records: Sequence[Record], x: str) -> Axes:
    lines = []
    for method in CONDITIONED:
        points = [(r[x], over_tables(r, "cka")) for r in records if r["method"] == method]
        if points:
            lines.append(_line(method, points))
    return Axes(title, x_label, "debiased CKA", lines)


PART = Part(
    name="tables",
    title="Tables of recommenders between runs",
    cells=_cells,
    lines=_lines,
    draw=_draw,
)
