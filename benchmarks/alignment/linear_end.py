"""The part `linear-end`: where the estimate stops holding, without decay and at n = d."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.alignment.estimate import label_noise_given_inputs
from benchmarks.alignment.linear_grid import (
    NOISES,
    at_threshold,
    estimate_of,
    panels_of,
    point_of,
    strengths,
)
from benchmarks.alignment.linear_networks import Task, alignment
from benchmarks.alignment.network_plot import draw_panels
from benchmarks.alignment.network_statistics import mean_of, peaks
from benchmarks.alignment.parts import Part, Record

SNRS = (0.1, 1.0, 10.0, 100.0)
RATIOS = (0.5, 0.8, 0.9, 1.0, 1.1, 1.25, 2.0)
SEEDS = {60: 64, 240: 32}
"""By width."""


@dataclass(frozen=True, kw_only=True)
class EndCell:
    """Pairs of solutions of least norm, to which networks from small weights go without decay."""

    noise: str
    snr: float
    ratio: float
    width: int
    seeds: int

    @property
    def key(self) -> str:
        """Everything that changes the result, as one line."""
        return (
            f"linear-end|{self.noise}|snr={self.snr:g}|ratio={self.ratio:g}"
            f"|width={self.width}|seeds={self.seeds}|version=1"
        )

    def measure(self) -> Record:
        """CKA and excess error of each seed; with noise of labels also CKA given the inputs."""
        s, t = strengths(self.noise, self.snr)
        size = round(self.ratio * self.width)
        aligned, errors, given = [], [], []
        for seed in range(self.seeds):
            task = Task(width=self.width, size=size, input_noise=s, label_noise=t, seed=seed)
            b = task.shared()[0]
            found: list[np.ndarray] = []
            for member in range(2):
                inputs, labels = task.seen(member)
                if not found or s:
                    left, values, right = np.linalg.svd(inputs, full_matrices=False)
                found.append(right.T @ (left.T @ labels / values))
            aligned.append(alignment(found[0][None], found[1][None]))
            errors.append(float(np.mean([np.square(w - b).sum() for w in found])))
            if not s:
                given.append(label_noise_given_inputs(values, right @ b, t))
        return {
            "noise": self.noise,
            "snr": self.snr,
            "ratio": self.ratio,
            "size": size,
            "width": self.width,
            "alignment": [float(f"{value:.3g}") for value in aligned],
            "error": [float(f"{value:.3g}") for value in errors],
        } | ({"given_inputs": float(np.mean(given))} if given else {})


def _cells(quick: bool) -> list[EndCell]:
    snrs, ratios = ((1.0, 100.0), (0.5, 1.0, 2.0)) if quick else (SNRS, RATIOS)
    return [
        EndCell(noise=noise, snr=snr, ratio=ratio, width=width, seeds=8 if quick else SEEDS[width])
        for noise in NOISES
        for snr in snrs
        for ratio in ratios
        for width in SEEDS
    ]


def _lines(records: Sequence[Record]) -> list[str]:
    if not records:
        return ["No cells yet."]
    out = [
        "Solutions of least norm, without decay: CKA ± 95 % over seeds (estimate for decay -> 0, "
        "with its term of 1 / d; with noise of labels also the exact mean for the inputs drawn).",
        "",
        *_agreement(records),
    ]
    for noise, title in NOISES.items():
        own = [record for record in records if record["noise"] == noise]
        if own:
            out += ["", f"### Least norm, {title}", "", *_table(own)]
        for width in sorted({record["width"] for record in own}):
            out += peaks([point_of(record) for record in own if record["width"] == width])
    return out


def _apart(record: Record) -> float:
    expected = estimate_of(record, 0.0).alignment
    return float(abs(np.mean(record["alignment"]) - expected))


def _agreement(records: Sequence[Record]) -> list[str]:
    out = []
    for noise, title in NOISES.items():
        own = [record for record in records if record["noise"] == noise]
        away = [record for record in own if not at_threshold(record["ratio"])]
        ends = [record for record in own if record["ratio"] == 1]
        near = [record for record in own if at_threshold(record["ratio"]) and record not in ends]
        counts = [
            f"{sum(_apart(record) <= bound for record in some)} of {len(some)} {where} within "
            f"{bound:g}"
            for some, where, bound in (
                (away, "cells away from the threshold", 0.02),
                (near, "near it", 0.05),
                (ends, "at n = d", 0.05),
            )
        ]
        out.append(f"- {title.capitalize()}, against the estimate: {', '.join(counts)}.")
        out += [
            f"  - Off at n = d: SNR {record['snr']:g}, d = {record['width']}: "
            f"{mean_of(np.array(record['alignment']))} against "
            f"{estimate_of(record, 0.0).alignment:.3f}."
            for record in ends
            if _apart(record) > 0.05
        ]
    given = [record for record in records if "given_inputs" in record]
    if given:
        close = [
            abs(record["given_inputs"] - np.mean(record["alignment"]))
            <= mean_of(np.array(record["alignment"])).half
            for record in given
        ]
        out.append(
            f"- The exact mean for the inputs drawn is inside the interval in {sum(close)} of "
            f"{len(close)} cells, where 95 % are to be expected."
        )
    return out


def _table(records: Sequence[Record]) -> list[str]:
    ratios = sorted({record["ratio"] for record in records})
    by = {(r["snr"], r["width"], r["ratio"]): r for r in records}
    out = [f"| SNR | d | {' | '.join(f'n / d = {ratio:g}' for ratio in ratios)} |"]
    out.append("| --- " * (len(ratios) + 2) + "|")
    for snr, width in sorted({(record["snr"], record["width"]) for record in records}):
        found = [by.get((snr, width, ratio)) for ratio in ratios]
        shown = " | ".join(_shown(record) if record else "" for record in found)
        out.append(f"| {snr:g} | {width} | {shown} |")
    return out


def _shown(record: Record) -> str:
    expected = [f"{estimate_of(record, 0.0).alignment:.3f}"]
    if "given_inputs" in record:
        expected.append(f"{record['given_inputs']:.3f}")
    return f"{mean_of(np.array(record['alignment']))} ({'; '.join(expected)})"


def _draw(records: Sequence[Record], path: Path) -> None:
    rows = []
    for width in SEEDS:
        own = [record for record in records if record["width"] == width]
        # The errors of least norm at n = d have no mean; they are in no plot.
        rows.append([row[0] for row in panels_of(own, 0.0)])
    draw_panels(rows, "n / d (dashed: estimate); rows: d = 60, 240", path)


LINEAR_END = Part(
    name="linear-end",
    title="Where the estimate stops holding: least norm, without decay",
    cells=_cells,
    lines=_lines,
    draw=_draw,
)
