"""The part `linear`: trained linear networks against the estimate, over noise and sample size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from benchmarks.alignment.estimate import Estimate, estimate
from benchmarks.alignment.linear_networks import Axes, Task, Trained, alignment, train
from benchmarks.alignment.network_plot import Curve, Panel, draw_panels
from benchmarks.alignment.network_statistics import Point, claims, mean_of
from benchmarks.alignment.parts import Part, Record

NOISES = {"inputs": "noise of inputs", "labels": "noise of labels"}
SNRS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
"""1 / s^2, or 1 / t^2."""
RATIOS = (0.2, 0.35, 0.5, 0.7, 0.85, 1.0, 1.2, 1.5, 2.0, 3.0, 5.0)
"""n / d."""
SEEDS = {"inputs": 32, "labels": 64}
"""Of labels more, since with shared inputs all of a seed depends on them."""
WIDTH, DECAY = 200, 0.01
AT_THRESHOLD = 1.25
"""Cells within this factor of n = d count as at the threshold, where 0.05 is asked, not 0.02."""


@dataclass(frozen=True, kw_only=True)
class LinearCell:
    """Pairs of networks, one pair a seed, at one noise and size."""

    noise: str
    snr: float
    ratio: float
    seeds: int
    width: int = WIDTH
    decay: float = DECAY

    @property
    def key(self) -> str:
        """Everything that changes the result, as one line."""
        return (
            f"linear|{self.noise}|snr={self.snr:g}|ratio={self.ratio:g}|seeds={self.seeds}"
            f"|width={self.width}|decay={self.decay:g}|version=1"
        )

    @property
    def strengths(self) -> tuple[float, float]:
        """s and t."""
        return strengths(self.noise, self.snr)

    def measure(self) -> Record:
        """CKA and excess error of each seed, and how far training came at worst."""
        aligned, errors, nets = [], [], []
        for seed in range(self.seeds):
            task = self._task(seed)
            b = task.shared()[0]
            pair: list[Trained] = []
            for member in range(2):
                inputs, labels = task.seen(member)
                if not pair or task.input_noise:
                    axes = Axes.of(inputs)
                pair.append(train(axes, labels, self.decay, 2 * seed + member))
            aligned.append(alignment(pair[0].first, pair[1].first))
            errors.append(float(np.mean([np.square(net.solution - b).sum() for net in pair])))
            nets += pair
        return {
            "noise": self.noise,
            "snr": self.snr,
            "ratio": self.ratio,
            "size": self._task(0).size,
            "width": self.width,
            "decay": self.decay,
            "alignment": [float(f"{value:.3g}") for value in aligned],
            "error": [float(f"{value:.3g}") for value in errors],
            "gradient": float(f"{max(net.gradient for net in nets):.1e}"),
            "gap": float(f"{max(net.gap for net in nets):.1e}"),
        }

    def _task(self, seed: int) -> Task:
        s, t = self.strengths
        size = round(self.ratio * self.width)
        return Task(width=self.width, size=size, input_noise=s, label_noise=t, seed=seed)


def strengths(noise: str, snr: float) -> tuple[float, float]:
    """s and t, deviations of the noise of inputs and of labels, of which one is 0."""
    deviation = snr**-0.5
    return (deviation, 0.0) if noise == "inputs" else (0.0, deviation)


def _cells(quick: bool) -> list[LinearCell]:
    snrs, ratios = ((0.1, 1.0, 100.0), (0.2, 0.5, 1.0, 2.0, 5.0)) if quick else (SNRS, RATIOS)
    return [
        LinearCell(noise=noise, snr=snr, ratio=ratio, seeds=8 if quick else SEEDS[noise])
        for noise in NOISES
        for snr in snrs
        for ratio in ratios
    ]


def estimate_of(record: Record, decay: float) -> Estimate:
    """What the formula gives for a cell."""
    s, t = strengths(record["noise"], record["snr"])
    return _estimate(record["ratio"], s, t, width=record["width"], decay=decay)


@cache
def _estimate(ratio: float, s: float, t: float, *, width: int, decay: float) -> Estimate:
    return estimate(ratio, input_noise=s, label_noise=t, decay=decay, width=width)


def point_of(record: Record) -> Point:
    """A record as `claims` wants it."""
    return Point(
        signal=record["snr"],
        noise=f"SNR {record['snr']:g}",
        size=record["size"],
        place=record["ratio"],
        alignment=np.array(record["alignment"]),
        error=np.array(record["error"]),
    )


def _lines(records: Sequence[Record]) -> list[str]:
    if not records:
        return ["No cells yet."]
    first = records[0]
    out = [
        f"Linear networks of {first['width']} inputs, 8 hidden units and one output, weight decay "
        f"{first['decay']:g}, trained by L-BFGS to their end: at worst, w is "
        f"{max(r['gap'] for r in records):.0e} of its length from the minimum. Each cell: measured "
        "CKA of hidden activations ± 95 % over seeds (estimate of "
        "`benchmarks/alignment/estimate.py`).",
        "",
        *_agreement(records),
    ]
    for noise, title in NOISES.items():
        own = [record for record in records if record["noise"] == noise]
        if own:
            seeds = len(own[0]["alignment"])
            out += ["", f"### Linear, {title}, {seeds} seeds", "", *table(own, _shown)]
            out += ["", "Excess error on new examples (estimate):", "", *table(own, _shown_error)]
            out += ["", *claims([point_of(record) for record in own])]
    return out


def table(records: Sequence[Record], shown: Callable[[Record], str]) -> list[str]:
    """A table of what is `shown` of each record: SNRs down, n / d across."""
    ratios = sorted({record["ratio"] for record in records})
    by = {(record["snr"], record["ratio"]): record for record in records}
    out = [f"| SNR | {' | '.join(f'n / d = {ratio:g}' for ratio in ratios)} |"]
    out.append("| --- " * (len(ratios) + 1) + "|")
    for snr in sorted({record["snr"] for record in records}):
        found = [by.get((snr, ratio)) for ratio in ratios]
        out.append(f"| {snr:g} | {' | '.join(shown(r) if r else '' for r in found)} |")
    return out


def _shown(record: Record) -> str:
    mean = mean_of(np.array(record["alignment"]))
    return f"{mean} ({estimate_of(record, record['decay']).alignment:.3f})"


def _shown_error(record: Record) -> str:
    mean = np.mean(record["error"])
    return f"{mean:.3g} ({estimate_of(record, record['decay']).error:.3g})"


def at_threshold(ratio: float) -> bool:
    """Whether a sample size counts as at the interpolation threshold."""
    return 1 / AT_THRESHOLD <= ratio <= AT_THRESHOLD


def _agreement(records: Sequence[Record]) -> list[str]:
    expected = np.array([estimate_of(record, record["decay"]).alignment for record in records])
    means = [mean_of(np.array(record["alignment"])) for record in records]
    apart = np.abs(np.array([mean.value for mean in means]) - expected)
    near = np.array([at_threshold(record["ratio"]) for record in records])
    asked = np.where(near, 0.05, 0.02)
    between = (expected > 0.05) & (expected < 0.95)
    outside = apart > np.array([mean.half for mean in means])
    errors = np.array([estimate_of(record, record["decay"]).error for record in records])
    of_error = np.abs(np.array([np.mean(r["error"]) for r in records]) / errors - 1)
    out = [
        f"- Within 0.02 of the estimate, and 0.05 at n / d from {1 / AT_THRESHOLD:g} to "
        f"{AT_THRESHOLD:g}: {_share(apart <= asked)}.",
        f"- Of those away from the threshold: {_share((apart <= asked)[~near])}; of those at it: "
        f"{_share((apart <= asked)[near])}, and within 0.02: {_share(apart[near] <= 0.02)}.",
        f"- Where the estimate is between 0.05 and 0.95: {_share((apart <= asked)[between])}.",
        f"- The interval leaves the estimate out: {_share(outside)}, where chance alone has 5 %.",
        f"- Error: in the median {np.median(of_error):.1%} from its estimate, at most "
        f"{of_error.max():.0%}.",
    ]
    far = sorted(np.flatnonzero(apart > asked).tolist(), key=lambda i: -apart[i])
    out += [
        f"- Further off: {NOISES[records[i]['noise']]}, SNR {records[i]['snr']:g}, n / d = "
        f"{records[i]['ratio']:g}: {means[i]} against {expected[i]:.3f}."
        for i in far[:8]
    ]
    return out


def _share(which: np.ndarray) -> str:
    return f"{which.sum()} of {which.size} cells" + (f" ({which.mean():.0%})" if which.size else "")


def panels_of(records: Sequence[Record], decay: float | None) -> list[list[Panel]]:
    """A row of panels for each noise: alignment, and error, against n / d.

    Args:
        records: of the cells.
        decay: of the estimate; None: that of each record.
    """
    rows = []
    for noise, title in NOISES.items():
        row = [Panel(title, "CKA"), Panel(title, "excess error", log_y=True)]
        own = [record for record in records if record["noise"] == noise]
        for snr in sorted({record["snr"] for record in own}):
            line = sorted((r for r in own if r["snr"] == snr), key=lambda r: r["ratio"])
            x = [record["ratio"] for record in line]
            expected = [estimate_of(r, r["decay"] if decay is None else decay) for r in line]
            for panel, name in zip(row, ("alignment", "error"), strict=True):
                means = [mean_of(np.array(record[name])) for record in line]
                values, halves = [m.value for m in means], [m.half for m in means]
                estimates = [getattr(one, name) for one in expected]
                panel.curves.append(Curve(f"SNR {snr:g}", x, values, halves, estimates))
        rows.append(row)
    return rows


def _draw(records: Sequence[Record], path: Path) -> None:
    draw_panels(panels_of(records, None), "n / d (dashed: estimate)", path)


LINEAR = Part(
    name="linear",
    title="Linear networks against the estimate",
    cells=_cells,
    lines=_lines,
    draw=_draw,
)
