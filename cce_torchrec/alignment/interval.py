"""How far a measure depends on the ids that it was taken of."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cce_torchrec.alignment.moments import Moments, total_of

_FEWEST = 32
"""Ids below which there is no interval."""
_NORMAL = 1.96
"""Standard errors on each side that hold 95 % of a normal distribution."""


@dataclass(frozen=True)
class Interval:
    """A measure, and between which values it is for other ids of the same kind, in 95 % of draws.

    It says nothing of other runs: those of two other seeds differ by more.
    """

    value: float
    low: float | None
    """None, as `high`, of fewer than 32 ids: leaving out some of so few says little."""
    high: float | None


def jackknife(measure: Callable[[Moments], float], parts: Sequence[Moments]) -> Interval:
    """A measure of all parts together, with an interval by leaving out each part once.

    A bootstrap would draw ids twice, whose pairs look aligned; this draws none.

    Source: Efron and Stein, "The jackknife estimate of variance", Annals of Statistics 1981.

    Raises:
        ValueError: what `measure` raises of all parts.
    """
    value, n = measure(total_of(parts)), len(parts)
    if sum(part.ids for part in parts) < _FEWEST:
        return Interval(value, None, None)
    try:
        left_out = [measure(total_of([*parts[:i], *parts[i + 1 :]])) for i in range(n)]
    except ValueError:  # of two parts, or where all vectors but one are equal
        return Interval(value, None, None)
    # Values with a part left out differ by 1/n of how parts differ: hence n - 1, not 1 / (n - 1).
    mean = math.fsum(left_out) / n
    error = _NORMAL * math.sqrt((n - 1) / n * math.fsum((one - mean) ** 2 for one in left_out))
    return Interval(value, value - error, value + error)


def jackknife_of_means(values: Sequence[float], scale: float = 1.0) -> Interval:
    """The same of a mean over ids, times `scale`."""
    n = len(values)
    mean = math.fsum(values) / n
    squares = math.fsum((one - mean) ** 2 for one in values)
    error = scale * _NORMAL * math.sqrt(squares / (n * max(1, n - 1)))
    return Interval(scale * mean, scale * mean - error, scale * mean + error)
