"""Markdown tables of the finished cells."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from benchmarks.quality.summary import BASELINE, Row

HEADER = (
    f"| method | log loss | minus {BASELINE} (error) | AUC | kB | parameters | kB while training "
    "| rate | CPU s |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
)
NOTES = """\
Log loss and AUC: means over the reported splits, at the best of the evaluations of every quarter
pass. "minus CE": mean of the differences split by split, and its standard error. kB: all that
serving keeps of the compressed tables. Rates were chosen on splits that are not reported; * is the
edge of those that were tried, one beyond the first ones included. Methods in parentheses hold the
full table while they train."""


def markdown(rows: Sequence[Row], unreproduced: dict[str, list[str]]) -> str:
    """A table for each data set, number of passes and budget, then what their marks mean."""
    out = []
    ordered = sorted(
        rows, key=lambda row: (row.group.dataset, -row.group.passes, _order(row.group.budget))
    )
    for (dataset, passes), part in itertools.groupby(
        ordered, key=lambda row: (row.group.dataset, row.group.passes)
    ):
        mine = list(part)
        out.append(f"### {dataset}, {passes} {'pass' if passes == 1 else 'passes'}")
        full = [row for row in mine if row.group.budget == "none"]
        for budget, at_budget in itertools.groupby(
            [row for row in mine if row.group.budget != "none"], key=lambda row: row.group.budget
        ):
            lines = [_line(row, unreproduced) for row in _sorted([*at_budget, *full])]
            out.append("\n".join([f"**{budget}**\n", HEADER, *lines]))
    out.append(NOTES)
    faults = [f"- {name}: {'; '.join(where)}" for name, where in sorted(unreproduced.items())]
    if faults:
        text = "† unreproduced: below its author's figures, and nothing is claimed over it."
        out.append("\n".join([text, *faults]))
    return "\n\n".join(out)


def _order(budget: str) -> tuple[str, float]:
    kind, _, amount = budget.partition("=")
    return kind, -float(amount or 0)


def _sorted(rows: list[Row]) -> list[Row]:
    """Those without the full table first, each by its log loss; those that do not fit last."""
    return sorted(
        rows,
        key=lambda row: (
            row.holds_full,
            not row.records,
            row.mean("log_loss") if row.records else 0,
        ),
    )


def _line(row: Row, unreproduced: dict[str, list[str]]) -> str:
    name = row.group.method + (" †" if row.group.method in unreproduced else "")
    name = f"({name})" if row.holds_full else name
    if row.choice is None:
        return f"| {name} | does not fit: {row.why_not} | | | | | | | |"
    cell = row.choice.cell
    form = cell.form or row.records[0].get("made", "")
    rate = f"{form} {cell.optimizer} {cell.rate:g}".strip() + "*" * row.choice.at_edge
    loss = f"{row.mean('log_loss'):.4f}" + ("" if row.complete else f" ({len(row.records)} splits)")
    cells = [
        name,
        loss,
        _difference(row),
        f"{row.mean('auc'):.4f}",
        f"{row.mean('table_bytes') / 1000:,.0f}",
        f"{row.mean('parameters'):,.0f}",
        f"{row.mean('training_bytes') / 1000:,.0f}",
        rate,
        f"{row.mean('cpu_seconds'):.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def _difference(row: Row) -> str:
    if row.difference is None:
        return ""
    mean, error = row.difference
    return f"{mean:+.4f}" + ("" if error is None else f" ({error:.4f})")
