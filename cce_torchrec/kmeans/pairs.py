"""Points of one CCE chunk: distinct (main row, helper row) pairs, weighted by their ids.

At most min(N, k * k') pairs exist, so K-means over all N ids is weighted K-means over them, and
the final assignment of ids is a lookup. Vectors are fixed-point integers, so that sums of any
part of them, in any order, are exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

_FIXED_POINT_BITS = 28
BLOCK = 1 << 16
"""Pairs scored at once; a fixed cut, because the bits of a product depend on its shape."""


@dataclass(frozen=True)
class PairPoints:
    """Distinct pairs and where their vectors come from.

    Shapes: `main_rows`, `helper_rows`, `counts`, `first` [P]; `pair_of_id` [N]; `main` [k, s] and
    `helper` [k', s] int64, to be divided by `scale`.
    """

    main_rows: torch.Tensor
    helper_rows: torch.Tensor
    counts: torch.Tensor
    first: torch.Tensor
    """Smallest sampling key of the pair's ids; decides which pairs start as centroids."""
    pair_of_id: torch.Tensor
    main: torch.Tensor
    helper: torch.Tensor
    scale: float

    @property
    def num_pairs(self) -> int:
        """Distinct pairs (P)."""
        return self.counts.numel()

    def integers(self, start: int, end: int) -> torch.Tensor:
        """Fixed-point vectors of pairs [start, end), int64 [., s]."""
        return self.main[self.main_rows[start:end]] + self.helper[self.helper_rows[start:end]]

    def vectors(self, start: int, end: int) -> torch.Tensor:
        """Vectors of pairs [start, end), float32 [., s]."""
        return (self.integers(start, end).double() / self.scale).float()


def fixed_point_scale(*parts: torch.Tensor) -> float:
    """The power of two that brings the largest magnitude of `parts` to at most 2^28.

    Raises:
        ValueError: if a value is NaN or infinite.
    """
    largest = max((float(p.abs().max()) for p in parts if p.numel()), default=0.0)
    if not all(bool(torch.isfinite(p).all()) for p in parts):
        raise ValueError("codebook weights are not finite (NaN or infinite)")
    if largest == 0.0:
        return 1.0
    _, exponent = torch.frexp(torch.tensor(largest, dtype=torch.float64))
    return 2.0 ** (_FIXED_POINT_BITS - int(exponent))


def pair_points(
    main: torch.Tensor,
    helper: torch.Tensor,
    main_rows: torch.Tensor,
    helper_rows: torch.Tensor,
    sampling_keys: torch.Tensor,
) -> PairPoints:
    """The distinct pairs of ids that read `main_rows` [N] and `helper_rows` [N] (int64).

    Args:
        main: [k, s], any float type.
        helper: [k', s].
        sampling_keys: int64 [N], all different; the pairs of the smallest keys start as
            centroids, which is a random start where the keys are hashes of the ids.

    Raises:
        ValueError: if a value is NaN or infinite.
    """
    main, helper = main.double(), helper.double()
    scale = fixed_point_scale(main, helper)
    keys = main_rows * helper.shape[0] + helper_rows
    distinct, inverse, counts = torch.unique(keys, return_inverse=True, return_counts=True)
    first = torch.full_like(distinct, torch.iinfo(torch.int64).max)
    first.scatter_reduce_(0, inverse, sampling_keys, "amin")
    return PairPoints(
        main_rows=distinct // helper.shape[0],
        helper_rows=distinct % helper.shape[0],
        counts=counts,
        first=first,
        pair_of_id=inverse,
        main=(main * scale).round().long(),
        helper=(helper * scale).round().long(),
        scale=scale,
    )
