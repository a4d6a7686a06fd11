"""What the clustering steps of runs did: charts by step, and a table of the last one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from cce_torchrec.report.charts import Line, line_chart
from cce_torchrec.report.grids import grid
from cce_torchrec.report.html import Html, tag
from cce_torchrec.report.numbers import number, percent, rounded_percent, short, whole
from cce_torchrec.report.runs import Run

Json = dict[str, Any]
_MOST_TABLES = 8
"""Tables whose lines are drawn, those with most ids."""


def clustering(runs: Sequence[Run]) -> list[Html]:
    """Charts of all clusterings, and by run what the last one did to each table."""
    if not any(run.of("clustering") for run in runs):
        return [
            tag("p", "There was no clustering step, or none that was written down.", class_="none")
        ]
    charts = [_objective(runs), *(_by_table(runs, *what) for what in _CHARTS)]
    out = [tag("div", [chart for chart in charts if chart is not None], class_="charts")]
    for run in runs:
        if run.of("clustering"):
            out.append(_last(run, alone=len(runs) == 1))
    return out


def _objective(runs: Sequence[Run]) -> Html | None:
    lines = []
    for place, run in enumerate(runs):
        who = "" if len(runs) == 1 else f"{run.name}, "
        for name, style in (("before", "dashed"), ("after", "solid")):
            points = _of_all_tables(run, f"objective_{name}")
            lines.append(
                Line(name=f"{who}{name}", points=points, color=place, style=style, dots=True)
            )
    note = "Sum of squared distances of embeddings to their main rows."
    return line_chart("Objective of K-means", lines, note=note, from_zero=True)


def _of_all_tables(run: Run, name: str) -> list[tuple[float, float]]:
    """Step and sum over all tables; those that a step left alone count as they were last."""
    points, latest = [], dict[str, float]()
    for line in run.of("clustering"):
        known = _tables(line)
        for table, chunks in known.items():
            latest[table] = _sum(name)(chunks) or 0.0
        step = number(line.get("step"))
        value = sum(latest.values()) if known else number(line.get(name))
        if step is not None and value is not None:
            points.append((step, value))
    return points


def _changed(chunks: Sequence[Json]) -> float | None:
    """Mean over chunks, by their ids."""
    pairs = [(number(chunk.get("changed")), number(chunk.get("ids")) or 1.0) for chunk in chunks]
    known = [(share, ids) for share, ids in pairs if share is not None]
    # A mean over ids, as chunks of several tables have other numbers of them.
    total = sum(ids for _, ids in known)
    return sum(share * ids for share, ids in known) / total if total else None


def _most(name: str) -> Callable[[Sequence[Json]], float | None]:
    def most(chunks: Sequence[Json]) -> float | None:
        return max(
            (n for chunk in chunks if (n := number(chunk.get(name))) is not None), default=None
        )

    return most


def _sum(name: str) -> Callable[[Sequence[Json]], float | None]:
    def total(chunks: Sequence[Json]) -> float | None:
        known = [n for chunk in chunks if (n := number(chunk.get(name))) is not None]
        return sum(known) if known else None

    return total


_CHARTS = (
    ("Codes changed", "changed", _changed, percent,
     "Share of ids with another cluster; renumbering does not count."),
    ("Imbalance", "imbalance", _most("imbalance"), short,
     "Of the least even chunk of a table; 1 is even."),
    ("Dead rows", "dead_rows", _sum("dead_rows"), whole,
     "Main rows that no id reads, of all chunks."),
)  # fmt: skip


def _by_table(
    runs: Sequence[Run],
    title: str,
    name: str,
    of: Callable[[Sequence[Json]], float | None],
    format: Callable[[float], str],
    note: str,
) -> Html | None:
    """A line a table; where several runs are compared, a line a run."""
    unit = rounded_percent if format is percent else None
    if len(runs) > 1:
        lines = [
            Line(name=run.name, points=run.points("clustering", name), color=place, dots=True)
            for place, run in enumerate(runs)
        ]
        return line_chart(title, lines, format=format, unit=unit, note=note, from_zero=True)
    (run,) = runs
    points: dict[str, list[tuple[float, float]]] = {}
    for line in run.of("clustering"):
        step = number(line.get("step"))
        for table, chunks in _tables(line).items():
            value = of(chunks)
            if step is not None and value is not None:
                points.setdefault(table, []).append((step, value))
    # More lines than colours would tell nothing.
    chosen = sorted(points, key=lambda table: -_ids(run, table))[:_MOST_TABLES]
    lines = [
        Line(name=table, points=points[table], color=place, dots=True)
        for place, table in enumerate(sorted(chosen))
    ]
    if not lines:  # without chunks the step as a whole is known
        lines = [Line(name=title, points=run.points("clustering", name), color=0, dots=True)]
    left = len(points) - len(chosen)
    more = f" The {len(chosen)} tables with most ids; {left} more are below." if left > 0 else ""
    return line_chart(title, lines, format=format, unit=unit, note=note + more, from_zero=True)


def _ids(run: Run, table: str) -> float:
    for line in run.of("clustering"):
        for chunk in _tables(line).get(table, ()):
            return number(chunk.get("ids")) or 0.0
    return 0.0


def _tables(line: Json) -> dict[str, list[Json]]:
    """The chunks of a clustering step by their table."""
    out: dict[str, list[Json]] = {}
    chunks = line.get("chunks")
    for chunk in chunks if isinstance(chunks, list) else ():
        if isinstance(chunk, dict):
            out.setdefault(str(chunk.get("table")), []).append(chunk)
    return out


def _last(run: Run, *, alone: bool) -> Html:
    lines = run.of("clustering")
    # Each table's own last one: those of rare ids are clustered after other steps.
    latest = {table: (own, line) for line in lines for table, own in _tables(line).items()}
    head = ["table", "after step", "chunks", "objective before", "after", "codes changed",
            "empty clusters", "dead rows", "imbalance", "seconds"]  # fmt: skip
    body = []
    for table, (chunks, line) in sorted(latest.items()):
        step = number(line.get("step"))
        sums = [_sum(name)(chunks) for name in ("objective_before", "objective_after")]
        body.append(
            [
                table, _shown(step, whole), str(len(chunks)),
                *(_shown(value, short) for value in sums),
                _shown(_changed(chunks), percent),
                _shown(_sum("empty_clusters")(chunks), whole),
                _shown(_sum("dead_rows")(chunks), whole),
                _shown(_most("imbalance")(chunks), short), _shown(_sum("seconds")(chunks), short),
            ]
        )  # fmt: skip
    step = number(lines[-1].get("step"))
    where = "" if step is None else f", after step {whole(step)}"
    title = f"The last of {len(lines)} clustering{'s' * (len(lines) != 1)}{where}"
    title = title if alone else f"{run.name}: {title[0].lower()}{title[1:]}"
    return tag("div", tag("h3", title), grid(head, body, left=1))


def _shown(value: float | None, format: Callable[[float], str]) -> str:
    return "" if value is None else format(value)
