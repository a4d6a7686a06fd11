"""What cells of networks show together, each claim with intervals over seeds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import stats

NEAR = 1.5
"""Within this factor of the interpolation threshold the lowest alignment is looked for."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """A cell: one setting, strength of noise and size of sample, over seeds.

    Seed i is of the same examples at each point, so that differences are taken seed by seed.
    """

    signal: float
    """By which noise is ordered: more is less noise."""
    noise: str
    """How the noise is called in tables."""
    size: int
    """n, examples."""
    place: float
    """n by the interpolation threshold."""
    alignment: np.ndarray
    """Of the members of each seed."""
    error: np.ndarray
    """Of each seed, on examples without noise."""


class Mean(NamedTuple):
    """A mean over seeds, and half the width of its interval."""

    value: float
    half: float

    @property
    def above(self) -> bool:
        """Whether the interval is above 0."""
        return self.value > self.half

    @property
    def below(self) -> bool:
        """Whether the interval is below 0."""
        return self.value < -self.half

    def __str__(self) -> str:
        return f"{self.value:.3f} ± {self.half:.3f}"


def mean_of(values: np.ndarray, comparisons: int = 1) -> Mean:
    """The mean and Student's interval.

    Args:
        values: one of each seed, [seeds].
        comparisons: how many intervals are to hold at once in 95 % of cases (Bonferroni).
    """
    count = len(values)
    if count < 2:
        return Mean(float(np.mean(values)), float("inf"))
    quantile = stats.t.ppf(1 - 0.025 / comparisons, count - 1)
    return Mean(float(np.mean(values)), float(quantile * np.std(values, ddof=1) / count**0.5))


def claims(points: Sequence[Point]) -> list[str]:
    """What all points of one setting say of SNR, size and error, as Markdown."""
    return [*_rise(points), "", *_dips(points), *peaks(points), "", *_errors(points)]


def _by(points: Sequence[Point], name: str) -> list[list[Point]]:
    """Points with the same `name`, each group in the order of the other variable."""
    ordered = sorted(points, key=lambda p: (getattr(p, name), p.signal, p.size))
    grouped = itertools.groupby(ordered, key=lambda p: getattr(p, name))
    return [list(group) for _, group in grouped]


def _long(points: Sequence[Point]) -> list[list[Point]]:
    """Points of the same noise, over sizes, where there are some between the ends."""
    return [curve for curve in _by(points, "signal") if len(curve) > 2]


def _rise(points: Sequence[Point]) -> list[str]:
    curves = [curve for curve in _by(points, "size") if len(curve) > 1]
    comparisons = sum(len(curve) - 1 for curve in curves)
    risen, falls = 0, []
    for curve in curves:
        steps = list(itertools.pairwise(curve))
        found = [mean_of(b.alignment - a.alignment, comparisons) for a, b in steps]
        down = [(a, b, step) for (a, b), step in zip(steps, found, strict=True) if step.below]
        falls += down
        rise = mean_of(curve[-1].alignment - curve[0].alignment)
        risen += rise.above and not down
    out = [
        f"Alignment rises with the signal at {risen} of {len(curves)} sizes: the whole rise is "
        f"significant, and no step is significantly down (intervals of all {comparisons} steps "
        "hold at once in 95 % of cases)."
    ]
    out += [
        f"- Down: n = {b.size} ({_times(b.place)} threshold), {a.noise} to {b.noise}: {step}."
        for a, b, step in sorted(falls, key=lambda fall: fall[2].value)[:6]
    ]
    return out + ([f"- and {len(falls) - 6} further steps down."] if len(falls) > 6 else [])


def _dips(points: Sequence[Point]) -> list[str]:
    out = [
        "| noise | lowest at n | by threshold | alike at n | alignment there | smallest n | "
        "largest n | dip |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    curves = _long(points)
    found, placed, elsewhere = 0, 0, 0
    for curve in reversed(curves):
        lowest = min(curve, key=lambda point: point.alignment.mean())
        alike = [p for p in curve if not mean_of(p.alignment - lowest.alignment).above]
        verdict = _dip(curve)
        found += verdict == "significant"
        elsewhere += verdict == "significant, elsewhere"
        placed += verdict == "significant" and all(map(_near, alike))
        sizes = f"{alike[0].size} to {alike[-1].size}" if len(alike) > 1 else "no other"
        means = [f"{mean_of(p.alignment)}" for p in (lowest, *_ends(curve))]
        row = [lowest.noise, str(lowest.size), _times(lowest.place), sizes, *means, verdict]
        out.append(f"| {' | '.join(row)} |")
    return [
        *out,
        "",
        f"The dip is significant at {found} of {len(curves)} strengths of noise: the lowest of the "
        f"sizes within a factor {NEAR:g} of the threshold is below both ends. At {placed} of them "
        "every size that cannot be told from the lowest of all is within that factor. At "
        f"{elsewhere} more there is a significant dip, but not within it.",
    ]


def _near(point: Point) -> bool:
    return 1 / NEAR <= point.place <= NEAR


def _dip(curve: Sequence[Point]) -> str:
    """Whether alignment is below that of both ends, near the threshold, or elsewhere."""
    inner = [point for point in curve[1:-1] if _near(point)]
    ends = _above(curve, inner) if inner else []
    if ends and all(end.above for end in ends):
        return "significant"
    if all(end.above for end in _above(curve, curve[1:-1])):
        return "significant, elsewhere"
    if not ends:
        return "no size is near"
    named = dict(zip(("smallest n", "largest n"), ends, strict=True))
    below = [name for name, end in named.items() if end.below]
    if below:
        return f"none: lower at the {' and the '.join(below)}"
    return f"within noise of the {' and the '.join(n for n, end in named.items() if not end.above)}"


def _above(curve: Sequence[Point], inner: Sequence[Point]) -> list[Mean]:
    """By how much alignment at each end is above the lowest of `inner`."""
    lowest = min(inner, key=lambda point: point.alignment.mean())
    # Any of the inner sizes could have been the lowest by chance.
    return [mean_of(p.alignment - lowest.alignment, 2 * len(inner)) for p in _ends(curve)]


def peaks(points: Sequence[Point]) -> list[str]:
    """Where alignment at the threshold is above that of both sizes next to it; none: no lines."""
    out = []
    for curve in _long(points):
        middle = min(range(1, len(curve) - 1), key=lambda i: abs(math.log(curve[i].place)))
        at = curve[middle]
        sides = [mean_of(at.alignment - curve[middle + i].alignment, 2) for i in (-1, 1)]
        if all(side.above for side in sides):
            out.append(
                f"{at.noise} at n = {at.size} ({mean_of(at.alignment)}, by {sides[0]} and "
                f"{sides[1]})"
            )
    if not out:
        return []
    return [
        "",
        "At the threshold alignment has a peak, above the sizes next to it on both sides: "
        f"{'; '.join(out)}.",
    ]


def _ends(curve: Sequence[Point]) -> tuple[Point, Point]:
    return curve[0], curve[-1]


def _errors(points: Sequence[Point]) -> list[str]:
    apart, against, worst = 0, 0, None
    correlations = []
    for curve in _by(points, "signal"):
        pairs = list(itertools.combinations(curve, 2))
        for a, b in pairs:
            aligned = mean_of(b.alignment - a.alignment, 2 * len(pairs))
            error = mean_of(b.error - a.error, 2 * len(pairs))
            if not (aligned.above or aligned.below) or not (error.above or error.below):
                continue
            apart += 1
            if aligned.above == error.above:
                against += 1
                margin = abs(aligned.value)
                if worst is None or margin > worst[0]:
                    worst = (margin, *((b, a) if aligned.above else (a, b)))
        ranks = [
            stats.spearmanr([p.alignment[i] for p in curve], [p.error[i] for p in curve])[0]
            for i in range(len(curve[0].alignment))
        ]
        correlations.append(f"{curve[0].noise}: {mean_of(np.nan_to_num(np.array(ranks)))}")
    out = [
        f"Of {apart} pairs of sizes at the same noise where both alignment and error differ "
        f"significantly, the more aligned networks have the larger error in {against}."
    ]
    if worst is not None:
        _, more, less = worst
        out.append(
            f"- For instance {more.noise}: at n = {more.size} alignment is "
            f"{mean_of(more.alignment)} and error {mean_of(more.error)}, at n = {less.size} "
            f"{mean_of(less.alignment)} and {mean_of(less.error)}."
        )
    out.append(
        "- Rank correlation of alignment with error over sizes (-1 if the more aligned were "
        f"always better): {'; '.join(reversed(correlations))}."
    )
    return out


def _times(place: float) -> str:
    return f"{place:.2g} x"
