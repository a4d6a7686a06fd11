"""summary.md: goals beside figures, then every part's tables. Without torch."""

from __future__ import annotations

from typing import Any

Json = dict[str, Any]


def page(report: Json) -> str:
    """The page of a report of `benchmarks.gpu`, in Markdown."""
    lines = [f"# {report['device'].get('name', 'no device')}: python -m benchmarks.gpu", ""]
    lines += _settings(report) + _goals(report) + _states(report)
    for name, part in report["parts"].items():
        lines += _part(name, part)
    return "\n".join(lines) + "\n"


def _settings(report: Json) -> list[str]:
    told = {
        "device": report["device"],
        "driver and clocks": report["driver"],
        "versions": report["versions"],
        "settings": report["settings"],
    }
    lines = [f"{key}: {_flat(value)}  " for key, value in told.items()]
    if any(part.get("quick") for part in report["parts"].values()):
        lines += ["", "Small shapes (`--quick`, or no GPU): they say that everything runs, and"]
        lines += ["nothing about the goals."]
    return [*lines, ""]


def _goals(report: Json) -> list[str]:
    rows = []
    for name, part in report["parts"].items():
        for goal in part.get("goals", []):
            sign = "at least" if goal["at_least"] else "at most"
            aim = f", aim {goal['aim']}" if goal["aim"] is not None else ""
            met = {True: "met", False: "**missed**", None: "not judged"}[goal["met"]]
            row = {"part": name, "what": goal["what"], "figure": goal["figure"]}
            row |= {"": goal["unit"], "goal": f"{sign} {goal['goal']}{aim}", "verdict": met}
            rows.append(row)
    return ["## Goals", "", *(table(rows) if rows else ["None was reached."]), ""]


def _states(report: Json) -> list[str]:
    rows = [
        {
            "part": name,
            "state": part["state"],
            "seconds": part["seconds"],
            "limit": part["limit"],
            "clocks after": _flat(part.get("clocks") or {}),
        }
        for name, part in report["parts"].items()
    ]
    return ["## Parts", "", *table(rows), ""]


def _part(name: str, part: Json) -> list[str]:
    lines = [f"## {name}", ""]
    lines += [f"- {note}" for note in part.get("notes", [])]
    lines += [f"- failed: {error}" for error in part.get("errors", [])]
    for title, rows in part.get("rows", {}).items():
        flat = [{k: v for k, v in row.items() if not isinstance(v, dict | list)} for row in rows]
        lines += ["", f"### {title}", "", *table(flat)]
        for row, plain in zip(rows, flat, strict=True):
            lines += _nested(row, ", ".join(map(_flat, list(plain.values())[:2])))
    if part.get("log"):
        lines += ["", "```", *part["log"], "```"]
    return [*lines, ""]


def _nested(row: Json, named: str) -> list[str]:
    """What a row holds beside plain values, a line each; kernels in a block."""
    lines = []
    for key, value in row.items():
        if key.startswith("longest kernels"):
            lines += ["", f"{key} ({named})", "", "```"]
            lines += [f"{ms:10.4f}  {kernel}" for kernel, ms in value.items()] + ["```"]
        elif isinstance(value, dict | list) and value:
            lines += ["", f"{key} ({named}): {_flat(value)}"]
    return lines


def table(rows: list[Json]) -> list[str]:
    """A Markdown table of rows, which may have different keys."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(keys) + " |", "| " + " | ".join("---" for _ in keys) + " |"]
    for row in rows:
        cells = [_flat(row.get(key)).replace("|", "/") for key in keys]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _flat(value: Any) -> str:
    """A value in one line; floats in four digits."""
    if value is None:
        return ""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_flat(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return ", ".join(map(_flat, value))
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
    return str(value)
