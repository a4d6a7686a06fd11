"""Codes as whole integers: new ones before they are packed, and those of old checkpoints."""

from __future__ import annotations

import torch

from cce_torchrec.packing import CodePacking


def whole_dtype(bits: int) -> torch.dtype:
    """Type of whole codes of `bits` bits: uint8, int16 (read as unsigned) or int32.

    int16 stands for unsigned 16 bits because torch.uint16 lacks the indexing operators.
    """
    if bits <= 8:
        return torch.uint8
    return torch.int16 if bits <= 16 else torch.int32


def whole_bytes(num_rows: int) -> int:
    """Bytes of a whole code that addresses `num_rows` rows."""
    return whole_dtype(CodePacking.of_rows(num_rows).bits).itemsize


def whole(rows: torch.Tensor, bits: int) -> torch.Tensor:
    """Rows as whole codes of `bits` bits; the inverse of `rows_of`."""
    return rows.to(whole_dtype(bits))


def rows_of(codes: torch.Tensor) -> torch.Tensor:
    """Whole codes as int64 rows; int16 holds unsigned values."""
    return codes.long() & 0xFFFF if codes.dtype == torch.int16 else codes.long()
