"""Rows of codebooks as serving stores them: FBGEMM's rows for inference, without padding.

A row of integers begins with its scale and its bias in float16, as FBGEMM's
`IntNBitTableBatchedEmbeddingBagsCodegen` reads it; values follow, of 4 bits the low half first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from fbgemm_gpu.split_embedding_configs import SparseType

_SCALE_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class RowType:
    """How the values of a row are stored."""

    name: str
    bits: int
    """Of a value."""
    sparse_type: SparseType
    """FBGEMM's name of it."""

    @property
    def number(self) -> int:
        """FBGEMM's number of it, and _lookup.cpp's."""
        return int(self.sparse_type.as_int())

    @property
    def quantised(self) -> bool:
        """Whether rows have a scale and a bias."""
        return self.bits < 16

    def row_bytes(self, dim: int) -> int:
        """Bytes of a row of `dim` values."""
        return -(-dim * self.bits // 8) + _SCALE_BYTES * self.quantised

    def packed(self, rows: torch.Tensor) -> torch.Tensor:
        """`rows` [R, s] of any float type as uint8 [R, row_bytes(s)]."""
        # FBGEMM quantises on CPUs as it looks up there.
        rows = rows.detach().float().cpu().contiguous()
        if not self.quantised:
            values = rows if self.bits == 32 else rows.half()
            return values.view(torch.uint8).view(len(rows), self.row_bytes(rows.shape[1]))
        quantise = torch.ops.fbgemm.FloatOrHalfToFusedNBitRowwiseQuantizedSBHalf
        # Scale and bias come last there, and first where lookups read them.
        return quantise(rows, self.bits).roll(_SCALE_BYTES, dims=1).contiguous()

    def is_finite(self, packed: torch.Tensor) -> bool:
        """Whether no value, or scale, of rows that `packed` made has overflowed."""
        if self.bits == 32:  # as they were, which were finite
            return True
        halves = packed[:, :_SCALE_BYTES] if self.quantised else packed
        return bool(torch.isfinite(halves.contiguous().view(torch.float16)).all())

    def unpacked(self, packed: torch.Tensor, dim: int) -> torch.Tensor:
        """The values float32 [R, dim] of rows that `packed` made."""
        values, *scaled = (part.float() for part in self.parts(packed, dim))
        return values * scaled[0] + scaled[1] if scaled else values

    def parts(self, packed: torch.Tensor, dim: int) -> list[torch.Tensor]:
        """Rows that `packed` made, as [R, dim] of float32, float16 or uint8.

        Those of integers have a byte for each value, and are followed by scales and biases float16
        [R, 1]: a value is integer * scale + bias.
        """
        if not self.quantised:
            return [packed.contiguous().view(torch.float32 if self.bits == 32 else torch.float16)]
        scales = packed[:, :_SCALE_BYTES].contiguous().view(torch.float16)
        values = packed[:, _SCALE_BYTES:]
        if self.bits == 4:
            values = torch.stack([values & 15, values >> 4], dim=2).flatten(1)
        return [values[:, :dim], scales[:, :1], scales[:, 1:]]


ROW_TYPES = {
    row_type.name: row_type
    for row_type in [
        RowType(name="fp32", bits=32, sparse_type=SparseType.FP32),
        RowType(name="fp16", bits=16, sparse_type=SparseType.FP16),
        RowType(name="int8", bits=8, sparse_type=SparseType.INT8),
        RowType(name="int4", bits=4, sparse_type=SparseType.INT4),
    ]
}


def row_type(name: str) -> RowType:
    """The type of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in ROW_TYPES:
        raise ValueError(f"row type {name!r} is none of {list(ROW_TYPES)}")
    return ROW_TYPES[name]
