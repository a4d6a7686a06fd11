"""Numbers of bytes as people write them: 40GB, 512MiB, 1000."""

from __future__ import annotations

import re

_UNITS = {"": 1, "b": 1} | {
    f"{letter}{middle}b": base**power
    for power, letter in enumerate("kmgtp", start=1)
    for middle, base in (("", 1000), ("i", 1024))
}
_SIZE = re.compile(r"\s*(\d[\d_]*(?:\.\d+)?)\s*([a-zA-Z]*)\s*")


def parse_bytes(text: str | int) -> int:
    """Bytes of "40GB" (1000^3), "512MiB" (1024^2), "1.5 TB" or a bare number.

    Raises:
        ValueError: it is none of these; "40G" is not, as it may mean either.
    """
    if isinstance(text, int) and not isinstance(text, bool) and text >= 0:
        return text
    found = _SIZE.fullmatch(str(text))
    unit = found[2].lower() if found else "?"
    if found is None or unit not in _UNITS:
        # A letter alone means 1000 to some, and 1024 to others.
        hint = f"; write {text}B or {text}iB" if f"{unit}b" in _UNITS and unit else ""
        raise ValueError(
            f"{text!r} is no number of bytes; give for example 40GB, 512MiB or 1000000{hint}"
        )
    return round(float(found[1].replace("_", "")) * _UNITS[unit])


def said_bytes(count: float) -> str:
    """A number of bytes for people, with three digits or four: "40.0 GB", "976 B"."""
    # From the largest unit down to the first that there is one of.
    for power, unit in reversed(list(enumerate(("B", "kB", "MB", "GB", "TB", "PB")))):
        if count >= 1000**power and power:
            return f"{count / 1000**power:.{2 if count < 10 * 1000**power else 1}f} {unit}"
    return f"{round(count)} B"
