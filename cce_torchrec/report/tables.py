"""What the tables of runs take, and how their rows and codes are used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cce_torchrec.report.charts import Bars, histogram_chart
from cce_torchrec.report.grids import grid
from cce_torchrec.report.html import Html, joined, tag
from cce_torchrec.report.numbers import number, percent, short, size, whole
from cce_torchrec.report.runs import Run

Json = dict[str, Any]
_OPEN = 3
"""Tables whose histograms are open from the start."""
_BINS = 40


def bytes_of(runs: Sequence[Run]) -> list[Html]:
    """Bars of the bytes of each table, full against compressed; and what tables are like."""
    out = []
    # One scale, so that bars of several runs compare.
    most = max((_most(table) for run in runs for table in run.tables), default=0.0)
    for run in runs:
        if not run.tables:
            note = _summary(run) or "run.json does not say what tables there are."
            out.append(tag("p", _who(run, runs), note, class_="none"))
            continue
        title = tag("h3", run.name) if len(runs) > 1 else None
        out.append(tag("div", title, _bars(run, most), _facts(run)))
    return out


def _summary(run: Run) -> str | None:
    """What an older run says of all tables together."""
    found, ratio = run.figure("table_bytes"), run.figure("compression_ratio")
    if found is None or ratio is None:
        return None
    return f"All tables together take {size(found)}, full ones {size(found * ratio)}."


def _parts(table: Json) -> dict[str, float]:
    """Bytes of a table by what they are of."""
    names = {"rows": "codebook_bytes", "codes": "code_bytes", "optimizer": "optimizer_bytes"}
    return {name: number(table.get(key)) or 0.0 for name, key in names.items()}


def _most(table: Json) -> float:
    """The longer bar of a table."""
    return max(sum(_parts(table).values()), number(table.get("full_bytes")) or 0.0)


def _bars(run: Run, most: float) -> Html:
    """Two bars a table, drawn as boxes: they are as wide as there is room."""
    rows = []
    for table in run.tables:
        parts, full = _parts(table), number(table.get("full_bytes")) or 0.0
        taken = parts["rows"] + parts["codes"]
        share = f", {percent(taken / full)} of full" if full else ""
        said = size(taken) + (share if table.get("kind") != "plain" else "")
        boxes = [
            tag(
                "i", class_=f"box {name}", style=_width(value, most), title=f"{name}: {size(value)}"
            )
            for name, value in parts.items()
            if value
        ]
        whole_ = tag("i", class_="box full", style=_width(full, most), title=f"full: {size(full)}")
        rows.append(
            tag(
                "li",
                tag("span", _name(table), class_="table-name"),
                tag(
                    "span", tag("span", boxes, class_="track"), tag("span", whole_, class_="track")
                ),
                tag("span", said, class_="bytes"),
            )
        )
    keys = (("rows", "rows (codebooks)"), ("codes", "codes"), ("optimizer", "optimizer state"),
            ("full", "a full table, rows alone"))  # fmt: skip
    legend = [tag("li", tag("i", class_=f"box {name}"), text) for name, text in keys]
    return joined([tag("ul", legend, class_="legend"), tag("ul", rows, class_="bars")])


def _width(value: float, most: float) -> str:
    # A table of a few bytes beside one of gigabytes is there, too.
    return f"width:{max(0.15, 100 * value / most if most else 0):.2f}%"


def _name(table: Json) -> str:
    return str(table.get("name") or table.get("table") or "")


def _facts(run: Run) -> Html:
    head = ["table", "kind", "features", "ids", "dim", "chunks", "rows", "bits of a code",
            "recipe", "sharding", "ranks", "bytes", "full", "optimizer"]  # fmt: skip
    body = []
    for table in run.tables:
        parts, full = _parts(table), number(table.get("full_bytes"))
        rows = [number(table.get(name)) for name in ("num_rows", "num_helper_rows")]
        body.append(
            [
                _name(table), table.get("kind"), _listed(table.get("features")),
                _whole(table, "num_embeddings"), _whole(table, "embedding_dim"),
                _whole(table, "num_chunks"),
                " + ".join(whole(n) for n in rows if n is not None), _whole(table, "code_bits"),
                table.get("recipe"), table.get("sharding"), _listed(table.get("ranks")),
                size(parts["rows"] + parts["codes"]), None if full is None else size(full),
                size(parts["optimizer"]),
            ]
        )  # fmt: skip
    return tag("details", tag("summary", "All that is known of them"), grid(head, body, left=3))


def _whole(table: Json, name: str) -> str:
    value = number(table.get(name))
    return "" if value is None else whole(value)


def _listed(found: Any) -> str:
    return ", ".join(map(str, found)) if isinstance(found, list) else ""


def _who(run: Run, runs: Sequence[Run]) -> str:
    return "" if len(runs) == 1 else f"{run.name}: "


def usage_of(runs: Sequence[Run]) -> list[Html]:
    """By table: histograms of code usage and row norms of each run, and what to look at."""
    names = dict.fromkeys(_name(table) for run in runs for table in run.table_health)
    if not names:
        text = "There is no health.json, which a run writes at its end."
        return [tag("p", text, class_="none")]
    return [_usage(name, runs, is_open=place < _OPEN) for place, name in enumerate(names)]


def _usage(name: str, runs: Sequence[Run], *, is_open: bool) -> Html:
    charts, said, facts = [], [], []
    for run in runs:
        table = next((t for t in run.table_health if _name(t) == name), None)
        if table is None:
            continue
        who = _who(run, runs)
        charts += [c for c in (_codes(who, table), _norms(who, table)) if c is not None]
        # Made when health was, so that all who read it say the same.
        warnings = table.get("warnings")
        said += [f"{who}{text}" for text in warnings] if isinstance(warnings, list) else []
        facts.append(f"{who}{_facts_of_health(table)}")
    return tag(
        "details",
        tag("summary", tag("b", name), *(tag("span", fact) for fact in facts)),
        tag("ul", [tag("li", text) for text in said], class_="warnings") if said else None,
        tag("div", charts, class_="charts"),
        open=is_open,
    )


def _chunks(table: Json) -> list[Json]:
    found = table.get("chunks")
    return [c for c in found if isinstance(c, dict)] if isinstance(found, list) else []


def _facts_of_health(table: Json) -> str:
    chunks = _chunks(table)
    if not chunks:
        untouched = number(table.get("untouched"))
        return "plain" + (f", {percent(untouched)} never trained" if untouched is not None else "")
    rows = (number(table.get("num_rows")) or 0) * len(chunks)
    used = rows - sum(number(chunk.get("empty_codes")) or 0 for chunk in chunks)
    shares = [n for chunk in chunks if (n := number(chunk.get("imbalance"))) is not None]
    energy = [n for chunk in chunks if (n := number(chunk.get("helper_energy"))) is not None]
    out = [f"{whole(used)} of {whole(rows)} codes used"]
    if shares:
        out.append(f"imbalance {short(min(shares))} to {short(max(shares))}")
    if energy and number(table.get("num_helper_rows")):
        out.append(f"{percent(sum(energy) / len(energy))} of the energy in the helper")
    return ", ".join(out)


def _codes(who: str, table: Json) -> Html | None:
    """How many codes have how many ids, of all chunks."""
    edges: list[float] = []
    counts: list[float] = []
    for chunk in _chunks(table):
        own, found = _histogram(chunk.get("usage"))
        edges = own if len(own) > len(edges) else edges
        counts = [
            (counts[at] if at < len(counts) else 0) + (found[at] if at < len(found) else 0)
            for at in range(max(len(counts), len(found)))
        ]
    if not counts:
        return None
    layer = Bars(name="codes", edges=edges, counts=counts, color=0)
    note = "How many codes have how many ids, of all chunks."
    title = f"{who}{_name(table)}: usage of codes"
    return histogram_chart(title, [layer], x_label="ids of a code", note=note, equal_widths=True)


def _norms(who: str, table: Json) -> Html | None:
    """Norms of rows: of all chunks together, main and helper."""
    parts: dict[str, list[tuple[list[float], list[float]]]] = {}
    for chunk in _chunks(table) or [{"rows": table.get("rows")}]:
        for kind in ("main", "helper", "rows"):
            rows = chunk.get(kind)
            if isinstance(rows, dict):
                edges, counts = _histogram(rows.get("norms"))
                if counts:
                    parts.setdefault(kind, []).append((edges, counts))
    layers = [
        Bars(name=kind, edges=edges, counts=counts, color=place, outline=place > 0)
        for place, kind in enumerate(parts)
        for edges, counts in [_together(parts[kind])]
    ]
    title = f"{who}{_name(table)}: norms of rows"
    note = "Of all chunks." if _chunks(table) else ""
    return histogram_chart(title, layers, x_label="norm of a row", note=note)


def _histogram(found: Any) -> tuple[list[float], list[float]]:
    """Edges and counts, if they are what they should be."""
    if not isinstance(found, dict):
        return [], []
    edges, counts = (
        [number(value) for value in part] if isinstance(part := found.get(name), list) else []
        for name in ("edges", "counts")
    )
    known = [e for e in edges if e is not None], [c for c in counts if c is not None and c >= 0]
    whole_ = len(known[0]) == len(edges) and len(known[1]) == len(counts)
    # Whatever a file has in place of a histogram is none.
    if not counts or not whole_ or len(edges) != len(counts) + 1 or known[0] != sorted(known[0]):
        return [], []
    return known


def _together(parts: Sequence[tuple[list[float], list[float]]]) -> tuple[list[float], list[float]]:
    """One histogram of several, each of whose bins is spread evenly over those that it meets."""
    if len(parts) == 1:
        return parts[0]
    low, high = min(edges[0] for edges, _ in parts), max(edges[-1] for edges, _ in parts)
    if low == high:
        return [low, high], [sum(sum(counts) for _, counts in parts)]
    # Each chunk has bins of its own, from its least norm to its largest.
    width = (high - low) / _BINS
    out = [0.0] * _BINS
    for edges, counts in parts:
        for left, right, count in zip(edges, edges[1:], counts, strict=False):
            first = min(_BINS - 1, int((left - low) / width))
            last = min(_BINS - 1, int((right - low) / width))
            for place in range(first, last + 1):
                begin = low + place * width
                met = min(right, begin + width) - max(left, begin)
                out[place] += count * (met / (right - left) if right > left else 1.0)
    return [low + place * width for place in range(_BINS + 1)], out
