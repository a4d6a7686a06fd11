"""Bytes of packed codes."""

from __future__ import annotations

import math


def code_bits(num_rows: int) -> int:
    """Bits of a code that tells `num_rows` rows apart: ceil(log2 k), 0 for one row."""
    return math.ceil(math.log2(num_rows)) if num_rows > 1 else 0


def packed_bytes(num_ids: int, bits: int) -> int:
    """Bytes of `num_ids` times `bits` bits."""
    return -(-num_ids * bits // 8)
