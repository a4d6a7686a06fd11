"""How the numbers of a tensor in two checkpoints differ."""

from __future__ import annotations

import math
from typing import Any

import torch

from cce_torchrec.checkpoint.saved_state import SavedState

Json = dict[str, Any]


class Difference:
    """How two tensors differ, of which blocks are given one after the other."""

    def __init__(self) -> None:
        self._equal = True
        self._most, self._relative = 0.0, 0.0
        self._squares, self._of_a = 0.0, 0.0
        self._not_finite = 0

    def add(self, a: torch.Tensor, b: torch.Tensor) -> None:
        """Takes a block of both, of one shape."""
        if a.dtype == b.dtype and torch.equal(_bits(a), _bits(b)):
            self._of_a += float(a.double().square().nansum())
            return
        self._equal = False
        # The difference of two float32 is exact in float64 wherever it matters.
        one, other = a.double(), b.double()
        apart = (one - other).abs()
        finite = apart.isfinite()
        self._not_finite += int((~finite).sum())
        apart = torch.where(finite, apart, 0.0)
        larger = torch.maximum(one.abs(), other.abs())
        share = torch.where(finite & (larger > 0), apart / larger, 0.0)
        if apart.numel():
            self._most = max(self._most, float(apart.max()))
            self._relative = max(self._relative, float(share.max()))
        self._squares += float(apart.square().sum())
        self._of_a += float(one.square().nansum())

    def told(self) -> Json:
        """equal (bit by bit), max_abs, max_relative, relative_norm, not_finite."""
        return {
            "equal": self._equal,
            "max_abs": self._most,
            "max_relative": self._relative,
            "relative_norm": relative(self._squares, self._of_a),
            "not_finite": self._not_finite,
        }


def relative(squares: float, of_a: float) -> float | None:
    """Norm of a difference over that of the first, from sums of squares; None beside zeros."""
    if squares == 0:
        return 0.0
    return math.sqrt(squares / of_a) if of_a > 0 and math.isfinite(of_a) else None


def compare_tensors(a: SavedState, b: SavedState, key: str) -> Json:
    """How the tensor `key` of two checkpoints differs.

    Returns:
        equal: bit by bit; max_abs, max_relative (to the larger of both), relative_norm (of the
        difference, to the first), not_finite (values whose difference is not finite). Where shapes
        or types differ, equal and these, as [a, b].
    """
    shapes, types = (a.shape(key), b.shape(key)), (a.dtype(key), b.dtype(key))
    if shapes[0] != shapes[1] or types[0] != types[1]:
        names = [str(one).removeprefix("torch.") for one in types]
        return {"equal": False, "shape": [list(one) for one in shapes], "dtype": names}
    found = Difference()
    if not shapes[0]:
        found.add(a.whole(key), b.whole(key))
        return found.told()
    for first, block in a.blocks(key):
        found.add(block, b.rows(key, first, first + len(block)))
    return found.told()


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    # Bits and not values, of which NaN is not equal to itself and -0 is equal to 0.
    return tensor.contiguous().reshape(-1).view(torch.uint8)
