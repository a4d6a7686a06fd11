"""Numbers as a page shows them, and the ticks of axes."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

_MOST = 1e100
_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def number(value: Any) -> float | None:
    """A number of JSON, None for anything else that a file may have in its place."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:  # Python's integers have no end
        return None
    # Nothing that is measured is larger, and sums and squares of these are finite.
    return found if abs(found) <= _MOST else None


def short(value: float) -> str:
    """Three digits or so: 12.3k, 0.00123, 1.2e-08."""
    size = abs(value)
    for unit, prefix in _PREFIXES:
        if size >= unit * 0.9995:
            return f"{value / unit:.3g}{prefix}"
    if size and (size < 1e-4):
        return f"{value:.2e}".replace("e-0", "e-")
    return f"{value:.3g}"


def whole(value: float) -> str:
    """All digits of a count, in groups."""
    return f"{value:,.0f}"


def size(value: float) -> str:
    """Bytes, with a unit of powers of 1,000."""
    for unit, prefix in _PREFIXES:
        if abs(value) >= unit:
            return f"{value / unit:.3g} {prefix}B"
    return f"{value:.0f} B"


def percent(value: float) -> str:
    """A share."""
    share = 100 * value
    if share and abs(share) < 0.1:
        return f"{share:.2g} %"
    return f"{share:.1f} %" if abs(share) < 99.95 else f"{share:.0f} %"


def rounded_percent(value: float) -> str:
    """A share that is a tick of an axis."""
    return f"{100 * value:.6g} %"


def duration(seconds: float) -> str:
    """How long: 3 h 12 min, 4 min 5 s, 12.3 s."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours / 24:.1f} days"


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers in [low, high], at most about `most`."""
    if not high > low:
        return [low]
    step = 10 ** math.floor(math.log10((high - low) / most))
    while (high - low) / step > most:
        # 1, 2, 5, 10, 20, ...: the first digit tells which is next.
        step *= 2.5 if f"{step:e}"[0] == "2" else 2
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [place * step for place in range(first, last + 1)]


def tick_label(value: float, values: list[float]) -> str:
    """A tick in as many digits as tell it from its neighbours."""
    most = max((abs(one) for one in values), default=0.0)
    if value == 0:
        return "0"
    if most >= 1e4:
        return short(value)
    step = min((b - a for a, b in pairwise(values)), default=abs(value))
    if most < 1e-3:
        return f"{value:.1e}".replace("e-0", "e-")
    digits = max(0, -math.floor(math.log10(step) + 1e-9)) if step > 0 else 2
    return f"{value:.{min(digits, 8)}f}"
