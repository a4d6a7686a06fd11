"""Manifests that tell whether they are as they were written: JSON with its own checksum."""

from __future__ import annotations

import json
import zlib
from typing import Any

_KEY = "crc32"


def checksum(described: dict[str, Any]) -> int:
    """CRC-32 of all that a manifest says but this."""
    rest = {key: value for key, value in described.items() if key != _KEY}
    # As it will be read: JSON has other keys than dictionaries, and another order of numbers.
    read = json.loads(json.dumps(rest))
    return zlib.crc32(json.dumps(read, sort_keys=True).encode())


def signed(described: dict[str, Any]) -> dict[str, Any]:
    """The manifest with its checksum."""
    return described | {_KEY: checksum(described)}


def is_as_written(found: dict[str, Any], *, needed: bool) -> bool:
    """Whether a manifest has the checksum of what it says.

    Args:
        found: what was read.
        needed: whether one without a checksum counts as damaged.
    """
    return (_KEY not in found and not needed) or found.get(_KEY) == checksum(found)


def shown(value: Any, most: int = 60) -> str:
    """A value out of a file for a message, which has to end though the value may not."""
    text = repr(value)
    return text if len(text) <= most else f"{text[: most - 4]} ..."
