"""The nearest centroid of ranges of points by the kernels of triton_kernel.py."""

from __future__ import annotations

import torch

from cce_torchrec.kmeans.gpu_blocks import points_at_once, width
from cce_torchrec.kmeans.points import MAX_INTEGER, Points, Sources
from cce_torchrec.kmeans.triton_kernel import (
    GROUPS,
    TOP,
    best_group,
    exact,
    in_tiles,
    second_look,
    split,
)


class Search:
    """Finds the nearest of `centroids` [k, s] to points; ties go to the lowest index."""

    def __init__(self, points: Points, centroids: torch.Tensor) -> None:
        k, dim = centroids.shape
        self._sources: Sources = points.sources()
        self._dim, device = dim, centroids.device
        reach = centroids.double().abs().amax().clamp(min=MAX_INTEGER / points.scale)
        # Powers of two: scaling is exact.
        unit = torch.exp2(torch.log2(TOP / reach).floor())
        self._unit = (unit / points.scale).view(1)
        padded = torch.zeros(in_tiles(k), width(dim), dtype=torch.float64, device=device)
        padded[:k, :dim] = centroids.double() * unit
        norms = padded.square().sum(1)
        half_norms = torch.full_like(norms, -torch.inf)
        half_norms[:k] = -0.5 * norms[:k]
        high = padded.half()
        low = (padded - high.double()).half()
        rest = padded - high.double()
        off_high, off_both = (
            rest.square().sum(1).amax(),
            (rest - low.double()).square().sum(1).amax(),
        )
        largest = norms.amax()
        reach = torch.stack([largest.sqrt(), largest / 2, off_high.sqrt(), off_both.sqrt()])
        self._reach = (reach * (1 + 2.0**-20)).float()
        self._halves, self._half_norms = (high, low), half_norms.float()
        self._exact = (padded, half_norms)
        self._buckets = torch.arange(GROUPS + 2, dtype=torch.uint8, device=device)

    def nearest(self, start: int, end: int) -> torch.Tensor:
        """Of points [start, end), int32."""
        out = torch.empty(end - start, dtype=torch.int32, device=self._unit.device)
        size = points_at_once(self._dim)
        for first in range(start, end, size):
            last = min(first + size, end)
            self._block(first, out[first - start : last - start])
        return out

    def _block(self, first: int, out: torch.Tensor) -> None:
        n, new = len(out), out.new_empty
        shape = (n, width(self._dim))
        halves = new(shape, dtype=torch.float16), new(shape, dtype=torch.float16)
        tolerance, bucket = new(n, 2, dtype=torch.float32), new(n, dtype=torch.uint8)
        split(self._sources, first, self._unit, self._reach, *halves, tolerance)
        best_group(halves[0], tolerance, self._halves[0], self._half_norms, bucket, self._dim)
        sorted_, order = torch.sort(bucket, stable=True)
        starts = torch.searchsorted(sorted_, self._buckets)
        ties = new(n), new(n), torch.zeros(1, dtype=torch.int32, device=out.device)
        looked_at = (halves, tolerance, self._halves, self._half_norms, order, starts)
        second_look(*looked_at, out, ties, self._dim)
        exact(self._sources, first, self._unit, *self._exact, ties, out)
