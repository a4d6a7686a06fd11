"""The tables of README.md and docs/results.md that follow from the finished cells.

python -m benchmarks.quality.pages

makes them anew, each between two comments of its page: `<!-- quality: flights 2 bytes -->`, data
set, passes and kind of budget (and "full" for the methods that hold the full table), or `<!--
quality: overview bytes -->`, and `<!-- end of quality -->`. A test holds the pages to the cells.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.quality.grid import Selection, groups
from benchmarks.quality.options import RESULTS
from benchmarks.quality.problems import PROBLEMS
from benchmarks.quality.store import Store
from benchmarks.quality.summary import Row, rows_of, unreproduced

PAGES = ("README.md", "docs/results.md")
_BLOCK = re.compile(r"(<!-- quality: (.+?) -->\n).*?(<!-- end of quality -->)", re.DOTALL)
_OWN = ("ours", "CCE, frequent recipe", "CCE, rare recipe")
"""What is no rival."""
_CLEAR = 2.0
"""Standard errors from which on a difference is one."""
_RESTARTED_BELOW = 1.25
"""Parameters an id below which a single pass over rare ids is restarted (docs/clustering.md)."""
_LABELS = {
    "flights": "flights, DLRM, D = 16",
    "ml-1m": "MovieLens-1M, GMF, D = 32",
    "gowalla": "Gowalla, GMF, D = 32",
    "synthetic-16": "synthetic, Criteo's numbers of ids over 100, DLRM, D = 16, one split",
    "synthetic-64": "the same data, D = 64",
}


_NAMES = {
    "hash": "hashing",
    "hash restarted": "hashing restarted",
    "CCE, as published": "CCE as published",
    "CCE, frequent recipe": 'CCE, recipe "frequent"',
    "CCE, rare recipe": 'CCE, recipe "rare" with codes',
    "product quantisation": "product quantisation of the trained full table",
}


@dataclass(frozen=True)
class Cells:
    """All rows of the grid that are finished, by data set, passes, budget and method."""

    rows: Mapping[tuple[str, int, str, str], Row]
    marked: frozenset[str]
    """Methods that are below their author's figures."""

    @classmethod
    def read(cls, results: Path = RESULTS) -> Cells:
        """Those of a folder of finished cells."""
        every = groups(Selection())
        rows = rows_of(every, Store(results).records, ())
        keys = ((r.group.dataset, r.group.passes, r.group.budget, r.group.method) for r in rows)
        return cls(dict(zip(keys, rows, strict=True)), frozenset(unreproduced(rows)))

    def at(self, dataset: str, passes: int, budget: str) -> dict[str, Row]:
        """By method, those that fit; in full where every split is there."""
        found = {
            key[3]: row for key, row in self.rows.items() if key[:3] == (dataset, passes, budget)
        }
        return {name: row for name, row in found.items() if row.records and row.complete}

    def full(self, dataset: str) -> Row:
        """Full tables, after as many passes as budgets have first."""
        return self.at(dataset, PROBLEMS[dataset].passes[0], "none")["full"]

    def name(self, method: str) -> str:
        """As a page has it."""
        return _NAMES.get(method, method) + (" †" if method in self.marked else "")


def minus(row: Row, other: Row) -> tuple[float, float | None]:
    """Log loss of `row` minus that of `other`, split by split: mean, and standard error if any."""
    there = {record["split"]: record["log_loss"] for record in other.records}
    pairs = [r["log_loss"] - there[r["split"]] for r in row.records if r["split"] in there]
    error = statistics.stdev(pairs) / len(pairs) ** 0.5 if len(pairs) > 1 else None
    return statistics.fmean(pairs), error


def comparison(cells: Cells, dataset: str, passes: int, kind: str, holds_full: bool) -> str:
    """Every method at the budgets of a kind, with ours minus it, and the standard error."""
    problem = PROBLEMS[dataset]
    budgets = [b for b in problem.budgets if b.startswith(kind)]
    if passes != problem.passes[0]:
        budgets = [b for b in problem.other_budgets if b.startswith(kind)]
    columns = [cells.at(dataset, passes, budget) for budget in budgets]
    shown = [name for name in _methods(columns) if _holds_full(columns, name) == holds_full]
    lines = [
        f"| | {' | '.join(map(_budget, budgets))} |",
        f"| --- |{' --- |' * len(budgets)}",
    ]
    for name in shown:
        found = [_compared(cells, column, name, dataset, passes, b)
                 for column, b in zip(columns, budgets, strict=True)]  # fmt: skip
        lines.append(f"| {cells.name(name)} | {' | '.join(found)} |")
    return "\n".join(lines)


def _methods(columns: Sequence[Mapping[str, Row]]) -> list[str]:
    """Those in any of the columns but full tables, by how they compare with the others there."""
    names = dict.fromkeys(name for column in columns for name in column if name != "full")

    def rank(name: str) -> float:
        # By mean ranks, as some fit larger budgets alone, at which all have lower losses.
        ranks = [
            sorted(column, key=lambda n: column[n].mean("log_loss")).index(name) / len(column)
            for column in columns
            if name in column
        ]
        return statistics.fmean(ranks)

    return sorted(names, key=rank)


def _holds_full(columns: Sequence[Mapping[str, Row]], name: str) -> bool:
    return next(column[name].holds_full for column in columns if name in column)


def _compared(
    cells: Cells, column: Mapping[str, Row], name: str, dataset: str, passes: int, budget: str
) -> str:
    """A cell of `comparison`."""
    row = column.get(name)
    if row is None:
        known = cells.rows.get((dataset, passes, budget, name))
        return "does not fit" if known is not None and known.choice is None else ""
    others = [
        r for r in column.values() if r.holds_full == row.holds_full and r.group.method != "full"
    ]
    loss = _short(row.mean("log_loss")) + "*" * bool(row.choice and row.choice.at_edge)
    if row.mean("log_loss") == min(r.mean("log_loss") for r in others):
        loss = f"**{loss}**"
    if name == "ours":
        return loss
    mean, error = minus(column["ours"], row)
    text = _short(mean, "+") + ("" if error is None else f", {_short(error)}")
    return f"{loss} ({text})"


def overview(cells: Cells, kind: str) -> str:
    """One line a budget: full tables, ours, the best of the rivals, and those that most know."""
    budgets = [
        (dataset, passes, budget)
        for dataset in _LABELS
        for passes in PROBLEMS[dataset].passes
        for budget in _asked(dataset, passes)
        if budget.startswith("bytes") == (kind == "bytes")
    ]
    title = "all compressed tables in" if kind == "bytes" else "at equal parameters, codes on top"
    heads = [title, "full tables", "this package", "best rival", "best that is not restarted",
             "CE restarted", "CE", "CCE as published", "hashing"]  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "| --- |" + " --- |" * (len(heads) - 1)]
    last: tuple[str, int] | None = None
    for dataset, passes, budget in budgets:
        column = cells.at(dataset, passes, budget)
        label = _budget(budget, cells, dataset)
        if last != (dataset, passes):
            label = f"{_LABELS[dataset]}, {_passes(passes)}: {label}"
        last = (dataset, passes)
        rivals = {n: r for n, r in column.items() if n not in _OWN and not r.holds_full}
        plain = {n: r for n, r in rivals.items() if not n.endswith("restarted")}
        best = min(rivals.values(), key=lambda row: row.mean("log_loss"))
        ahead = _ahead(column["ours"], best)
        found = [
            f"{cells.full(dataset).mean('log_loss'):.4f}",
            _bold(f"{column['ours'].mean('log_loss'):.4f}", ahead < 0)
            + _kind(cells, column["ours"]),
            _named(cells, best, ahead > 0),
            _named(cells, min(plain.values(), key=lambda row: row.mean("log_loss")), False),
        ]
        for name in ("CE restarted", "CE", "CCE, as published", "hash"):
            found.append(f"{column[name].mean('log_loss'):.4f}" if name in column else "")
        lines.append(f"| {label} | {' | '.join(found)} |")
    return "\n".join(lines)


def _asked(dataset: str, passes: int) -> Sequence[str]:
    problem = PROBLEMS[dataset]
    return problem.budgets if passes == problem.passes[0] else problem.other_budgets


def _ahead(ours: Row, best: Row) -> int:
    """-1 where ours is clearly below the best rival, 1 where it is clearly above, 0 otherwise."""
    mean, error = minus(ours, best)
    if error is None or abs(mean) <= _CLEAR * error:
        return 0
    return -1 if mean < 0 else 1


def _kind(cells: Cells, row: Row) -> str:
    """What ours is where it has no codes."""
    made = str(row.records[0].get("made", ""))
    if not re.search(r"\b1 main row\b", made):
        return ""
    group = row.group
    ids = cells.full(group.dataset).mean("parameters") / PROBLEMS[group.dataset].dim
    restarted = group.passes > 1 or row.mean("parameters") / ids < _RESTARTED_BELOW
    return ", restarted CE" if restarted else ", CE"


def _named(cells: Cells, row: Row, bold: bool) -> str:
    loss = f"{row.mean('log_loss'):.4f}"
    return f"{_bold(loss, bold)}, {cells.name(row.group.method)}"


def _bold(text: str, bold: bool) -> str:
    return f"**{text}**" if bold else text


def _short(number: float, sign: str = "") -> str:
    """Four digits, without the 0 in front of the point."""
    return f"{number:{sign}.4f}".replace("0.", ".", 1)


def _passes(passes: int) -> str:
    return "one pass" if passes == 1 else f"{passes} passes"


def _budget(budget: str, cells: Cells | None = None, dataset: str = "") -> str:
    """As a reader has it; with `cells` also how much of the full tables that is."""
    kind, _, amount = budget.partition("=")
    if kind == "share":
        return f"1/{1 / float(amount):g} of the parameters"
    if kind == "ppd":
        return f"{float(amount):,.0f} a dimension"
    kilobytes = float(amount) / 1000
    text = f"{kilobytes:,.0f} kB" if kilobytes < 4000 else f"{kilobytes / 1000:,.0f} MB"
    if cells is None:
        return text
    share = 100 * float(amount) / cells.full(dataset).mean("table_bytes")
    return f"{text} ({share:.2g} % of full)"


def block(cells: Cells, directive: str) -> str:
    """What a comment asks for.

    Raises:
        ValueError: it is none of the forms that there are.
    """
    words = directive.split()
    if len(words) == 2 and words[0] == "overview" and words[1] in ("bytes", "parameters"):
        return overview(cells, words[1])
    if len(words) in (3, 4) and words[0] in PROBLEMS and words[1].isdigit():
        return comparison(cells, words[0], int(words[1]), words[2], words[3:] == ["full"])
    raise ValueError(f"<!-- quality: {directive} --> is none of the forms of {__name__}")


def renewed(text: str, cells: Cells) -> str:
    """A page with its tables as the cells have them."""
    return _BLOCK.sub(lambda found: f"{found[1]}{block(cells, found[2])}\n{found[3]}", text)


def main() -> None:
    """Rewrites the pages."""
    cells = Cells.read()
    for page in map(Path, PAGES):
        page.write_text(renewed(page.read_text(), cells))


if __name__ == "__main__":
    main()
