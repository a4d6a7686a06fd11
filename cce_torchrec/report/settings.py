"""Settings and versions of runs, with what differs between them first."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from cce_torchrec.report.grids import grid
from cce_torchrec.report.html import Html, tag
from cce_torchrec.report.runs import Run

_ABSENT = "-"


def settings(runs: Sequence[Run]) -> list[Html]:
    """All settings of runs, and the file of those that say them nowhere else."""
    out = _compared(runs, lambda run: run.settings, "settings")
    for run in runs:
        if run.config and (not run.settings or len(runs) == 1):
            who = "" if len(runs) == 1 else f"{run.name}: "
            text = tag("pre", tag("code", run.config))
            out.append(tag("details", tag("summary", f"{who}config.yaml"), text))
    return out


def versions(runs: Sequence[Run]) -> list[Html]:
    """Versions of libraries, with the device."""

    def found(run: Run) -> dict[str, Any]:
        device = run.info.get("device") or run.summary.get("device")
        return run.versions | ({"device": device} if device else {})

    return _compared(runs, found, "versions")


def _compared(runs: Sequence[Run], found: Callable[[Run], dict[str, Any]], what: str) -> list[Html]:
    by_run = [_flat(found(run)) for run in runs]
    names = list(dict.fromkeys(name for one in by_run for name in one))
    if not names:
        return [tag("p", f"No {what} were written down.", class_="none")]
    rows = {name: [one.get(name, _ABSENT) for one in by_run] for name in names}
    differing = [name for name in names if len(set(rows[name])) > 1]
    # What differs is what a comparison is read for.
    ordered = differing + [name for name in names if name not in differing]
    head = ["", *(run.name for run in runs)] if len(runs) > 1 else ["name", "value"]
    table = grid(
        head,
        [[name, *rows[name]] for name in ordered],
        left=len(head),
        highlighted=range(len(differing)),
        class_="settings",
    )
    if len(runs) == 1:
        return [table]
    count = f"{len(differing)} of {len(names)} differ" if differing else "All are the same"
    return [tag("p", f"{count}{', and come first' if differing else ''}."), table]


def _flat(found: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Values as text, those of dictionaries by the names joined with dots."""
    out: dict[str, str] = {}
    for name, value in found.items():
        # An empty dictionary is a value, too.
        if isinstance(value, dict) and value:
            out |= _flat(value, f"{prefix}{name}.")
        else:
            out[f"{prefix}{name}"] = value if isinstance(value, str) else json.dumps(value)
    return out
