"""What compressing all tables of a public data set was seen to cost, by bytes."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Curve:
    """What compressing all tables of one data set was seen to cost."""

    source: str
    rare: bool
    """Whether its ids are rare, by the threshold of the recipe "auto"."""
    points: tuple[tuple[float, float], ...]
    """Bytes, codes counted, over those of the full tables, rising; log loss over that of them."""

    def increase(self, share: float) -> float:
        """Log loss more at `share` of the bytes, in between by the logarithm of the bytes."""
        at = [math.log(own) for own, _ in self.points]
        return _between(at, [loss for _, loss in self.points], math.log(share))

    def share(self, increase: float) -> float:
        """The least share of the bytes at which log loss is more by `increase`.

        1 where it is less than what was measured at most bytes; the least that was measured where
        it is more.
        """
        if increase < self.points[-1][1]:
            return 1.0
        falling = [(loss, math.log(own)) for own, loss in reversed(self.points)]
        return math.exp(_between([x for x, _ in falling], [y for _, y in falling], increase))

    def beyond(self, increase: float) -> str:
        """What to say of `increase`, if it is more or less than any that was measured; else ""."""
        (low, most), (high, least) = self.points[0], self.points[-1]
        if increase < least:
            return (
                f"; a loss_increase of {increase:g} is less than any that was measured "
                f"({least:.4f} at {high:.1%} of the bytes, on {self.source})"
            )
        if increase > most:
            return (
                f"; a loss_increase of {increase:g} is more than any that was measured ({most:.4f} "
                f"at {low:.1%} of the bytes), and fewer bytes were not: give them as table_bytes"
            )
        return ""

    @property
    def measured(self) -> str:
        """What it is, and from where to where."""
        low, high = self.points[0][0], self.points[-1][0]
        return f"{self.source}, measured from {low:.1%} to {high:.1%} of the bytes"


CURVES = (
    Curve(
        source="flights (DLRM, D = 16, 10 to 77 examples an id, benchmarks.quality)",
        rare=True,
        points=((0.0173, 0.0225), (0.0346, 0.0135), (0.0726, 0.0067), (0.152, 0.0026)),
    ),
    Curve(
        source="MovieLens-1M (GMF, D = 32, 120 and 198 examples an id, docs/results.md)",
        rare=False,
        # Of 36 kB by the training program, whose figures at more bytes are those of the benchmark.
        points=((0.0289, 0.0620), (0.0835, 0.0335), (0.241, 0.0135)),
    ),
)
"""Of the recipes "rare" and "frequent"."""


def _between(at: Sequence[float], values: Sequence[float], x: float) -> float:
    """The value at `x` of a line through the points (at, values), rising; flat beyond its ends."""
    if x <= at[0]:
        return values[0]
    if x >= at[-1]:
        return values[-1]
    i = bisect.bisect_right(at, x)
    part = (x - at[i - 1]) / (at[i] - at[i - 1])
    return values[i - 1] + part * (values[i] - values[i - 1])
