"""What the parts `networks-*` show, and the parts themselves."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.alignment.network_plot import Curve, Panel, draw_panels
from benchmarks.alignment.network_statistics import Point, claims, mean_of
from benchmarks.alignment.parts import Part, Record
from benchmarks.alignment.small_grid import cells
from benchmarks.alignment.small_problems import PROBLEMS

NOISES = {"inputs": "noise of inputs", "labels": "noise of labels", "flips": "flipped labels"}
LEFT = 0.1
"""Training error counts as having left 0 from this part of that of the largest sample on."""


def threshold_of(records: Sequence[Record]) -> float:
    """The n where training error leaves 0, between sizes by log n.

    Medians over seeds, since a few networks get stuck in training.

    Args:
        records: of one noise and strength.
    """
    curve = sorted(records, key=lambda record: record["size"])
    sizes = [float(record["size"]) for record in curve]
    errors = [float(np.median(record["training"])) for record in curve]
    bound = LEFT * errors[-1]
    # The largest sample is there in any case; sizes before the last one below are fitted.
    i = max((i for i, error in enumerate(errors) if error < bound), default=-1) + 1
    if i in (0, len(errors)):
        return sizes[min(i, len(errors) - 1)]
    part = (bound - errors[i - 1]) / (errors[i] - errors[i - 1])
    return sizes[i - 1] * (sizes[i] / sizes[i - 1]) ** part


def _signal(record: Record) -> float:
    strength = float(record["strength"])
    return -strength if record["noise"] == "flips" else strength


def _called(record: Record) -> str:
    strength = record["strength"]
    return f"{100 * strength:g} % flipped" if record["noise"] == "flips" else f"SNR {strength:g}"


def _thresholds(records: Sequence[Record]) -> dict[float, float]:
    """Of one noise, by its strengths as `_signal` orders them."""
    return {
        signal: threshold_of([record for record in records if _signal(record) == signal])
        for signal in sorted({_signal(record) for record in records})
    }


def _points(records: Sequence[Record]) -> list[Point]:
    """Of one noise, where every network has something to align."""
    thresholds = _thresholds(records)
    return [
        Point(
            signal=_signal(record),
            noise=_called(record),
            size=record["size"],
            place=record["size"] / thresholds[_signal(record)],
            alignment=np.array(record["alignment"]),
            error=np.array(record["error"]),
        )
        for record in records
        if not record["dead"]
    ]


def _lines(name: str, records: Sequence[Record]) -> list[str]:
    if not records:
        return ["No cells yet."]
    problem = PROBLEMS[name]
    apart = max(
        abs(np.mean(record["alignment"]) - np.mean(record["debiased"])) for record in records
    )
    out = [
        f"ReLU networks of {problem.hidden} hidden units, trained by Adam from small weights of "
        "their own, two a seed. Alignment is linear CKA of hidden activations over 500 held-out "
        f"examples without noise ± 95 % over {len(records[0]['alignment'])} seeds; debiased CKA "
        f"differs from it by {apart:.3f} at most. Error is "
        + ("the share of wrong classes." if problem.classes else "the mean square, of variance 1.")
    ]
    dead = sum(record["dead"] for record in records)
    if dead:
        out[0] += (
            f" In {dead} pairs all hidden units of a network are 0 on almost all of these "
            "examples, which counts as an alignment of 0; their cells are left out of the claims."
        )
    for noise, title in NOISES.items():
        own = [record for record in records if record["noise"] == noise]
        if not own:
            continue
        called = {_signal(record): _called(record) for record in own}
        places = [f"{n:.0f} ({called[signal]})" for signal, n in _thresholds(own).items()]
        out += [
            "",
            f"### {problem.title.capitalize()}, {title}",
            "",
            "The interpolation threshold, where the median training error reaches "
            f"{LEFT:g} of that of the largest sample: n = {', '.join(places)}. Each strength has "
            "one of its own, since fitting noisier labels takes more of the weights.",
        ]
        for what, shown in _SHOWN.items():
            out += ["", f"{what}:", "", *_table(own, shown)]
        out += ["", *claims(_points(own))]
    return out


_SHOWN: dict[str, Callable[[Record], str]] = {
    "Alignment": lambda record: (
        str(mean_of(np.array(record["alignment"])))
        + (f" ({record['dead']} pairs of 0)" if record["dead"] else "")
    ),
    "Error, and training error in the median": lambda record: (
        f"{np.mean(record['error']):.3g} ({np.median(record['training']):.2g})"
    ),
}


def _table(records: Sequence[Record], shown: Callable[[Record], str]) -> list[str]:
    sizes = sorted({record["size"] for record in records})
    by = {(_signal(record), record["size"]): record for record in records}
    out = [f"| noise | {' | '.join(f'n = {size}' for size in sizes)} |"]
    out.append("| --- " * (len(sizes) + 1) + "|")
    for signal in sorted({_signal(record) for record in records}):
        line = [by.get((signal, size)) for size in sizes]
        called = next(_called(record) for record in line if record)
        out.append(f"| {called} | {' | '.join(shown(r) if r else '' for r in line)} |")
    return out


def _draw(records: Sequence[Record], path: Path) -> None:
    rows = []
    for noise, title in NOISES.items():
        own = [record for record in records if record["noise"] == noise]
        if not own:
            continue
        points = _points(own)
        row = [Panel(title, "CKA"), Panel(title, "error", log_y=True)]
        for signal in sorted({point.signal for point in points}):
            line = sorted((p for p in points if p.signal == signal), key=lambda p: p.size)
            for panel, name in zip(row, ("alignment", "error"), strict=True):
                means = [mean_of(getattr(point, name)) for point in line]
                # An interval that is not finite is of one seed, and drawn as none.
                halves = [m.half if math.isfinite(m.half) else 0.0 for m in means]
                x = [point.place for point in line]
                panel.curves.append(Curve(line[0].noise, x, [m.value for m in means], halves))
        rows.append(row)
    if rows:
        draw_panels(rows, "n by the interpolation threshold", path)


NETWORKS = {
    f"networks-{name}": Part(
        name=f"networks-{name}",
        title=f"Small ReLU networks: {problem.title}",
        cells=partial(cells, name),
        lines=partial(_lines, name),
        draw=_draw,
    )
    for name, problem in PROBLEMS.items()
}
