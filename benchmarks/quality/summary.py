"""What the finished cells say: one row for each method at each budget of each data set."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.quality.authors import below_author
from benchmarks.quality.cells import Cell, Group
from benchmarks.quality.grid import (
    Choice,
    chosen,
    group_of,
    missing,
    splits_of,
    tuned,
    why_unfit,
)
from benchmarks.quality.methods import METHODS
from benchmarks.quality.store import Record

BASELINE = "CE"
"""Differences are taken from it, split by split."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A method at a budget, over the reported splits that are finished."""

    group: Group
    choice: Choice | None
    """The rate; None where the budget is too small."""
    records: list[Record]
    """Of the reported splits."""
    complete: bool
    """Whether every split that was asked for is there."""
    difference: tuple[float, float | None] | None
    """Log loss minus that of `BASELINE`, and its standard error over splits, where there are
    several."""
    why_not: str = ""
    """Why the method does not fit the budget."""

    def mean(self, name: str) -> float:
        """Of a number of the records."""
        return statistics.fmean(record[name] for record in self.records)

    @property
    def holds_full(self) -> bool:
        """Whether training holds the full table."""
        return METHODS[self.group.method].holds_full


def rows_of(
    groups: Sequence[Group], records: Mapping[str, Record], asked: Sequence[int]
) -> list[Row]:
    """The rows of all `groups` of which something is to be said."""
    out = []
    for group in groups:
        if not tuned(group, records):
            continue
        choice = chosen(group, records)
        if choice is None:
            out.append(
                Row(
                    group=group,
                    choice=None,
                    records=[],
                    complete=True,
                    difference=None,
                    why_not=why_unfit(group, records),
                )
            )
            continue
        own = reported(choice.cell, group, records, asked)
        if own:
            out.append(
                Row(
                    group=group,
                    choice=choice,
                    records=own,
                    complete=not missing(group, records, asked),
                    difference=_difference(group, own, records),
                )
            )
    return out


def reported(
    cell: Cell, group: Group, records: Mapping[str, Record], asked: Sequence[int]
) -> list[Record]:
    """The finished records of the reported splits at the rate of `cell`."""
    keys = [cell.on(split).key for split in splits_of(group, asked)]
    return [records[key] for key in keys if records.get(key, {}).get("log_loss") is not None]


def _difference(
    group: Group, own: list[Record], records: Mapping[str, Record]
) -> tuple[float, float | None] | None:
    """Paired over the splits that both have; full tables are compared at no budget."""
    baseline = group_of(group.dataset, group.passes, BASELINE, group.budget)
    if group.budget == "none" or not tuned(baseline, records):
        return None
    choice = chosen(baseline, records)
    if choice is None:
        return None
    pairs = [
        record["log_loss"] - loss
        for record in own
        if (loss := records.get(choice.cell.on(record["split"]).key, {}).get("log_loss"))
    ]
    if not pairs:
        return None
    error = statistics.stdev(pairs) / len(pairs) ** 0.5 if len(pairs) > 1 else None
    return statistics.fmean(pairs), error


def unreproduced(rows: Sequence[Row]) -> dict[str, list[str]]:
    """For each method that is below its author's figures, where it is."""
    out: dict[str, list[str]] = {}
    for row in rows:
        if row.records:
            fault = below_author(row.group, row.mean("auc"))
            if fault:
                out.setdefault(row.group.method, []).append(fault)
    # The same method restarted, of which its author has no figures, is no better known.
    restarted = {f"{name} restarted": name for name in out if f"{name} restarted" in METHODS}
    return out | {name: [f"as {of} is"] for name, of in restarted.items() if name not in out}
