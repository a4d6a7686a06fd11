"""The nearest centroid of ranges of points: launches the kernels of triton_kernel.py."""

from __future__ import annotations

import torch
import triton

from cce_torchrec.gpu.launch import launch
from cce_torchrec.kmeans import triton_kernel as kernels
from cce_torchrec.kmeans.gpu_blocks import dims_at_once, points_at_once, width
from cce_torchrec.kmeans.points import MAX_INTEGER, Points

GROUPS = 32
TOP = 256.0
"""Largest coordinate after scaling: float16 has its full precision down to 6e-5."""
_EXACT_DIMS, _EXACT_POINTS, _EXACT_CENTROIDS, _EXACT_PROGRAMS = 32, 1, 128, 2112
_SPLIT_POINTS = 64
_POINTS, _WARPS, _STAGES, _FOLD = 128, 4, 3, 2
"""Points of a tile, its warps, tiles of centroids that are fetched ahead, and how many times the
number of groups a tile of centroids has: with two, registers are left for four programs at a time,
some of which multiply while others compare. Measured on an H100 for points of 32 coordinates."""
_LOOK_POINTS, _LOOK_WARPS = 128, 4

Halves = tuple[torch.Tensor, torch.Tensor]
"""float16 [n, width] each, whose sum has 22 bits of what they stand for."""
Ties = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""int32 [n] and [n], points whose lead is within rounding, and their buckets; their number, int32
[1], which is added to."""


def turn_error(device: torch.device) -> float:
    """How far tensor cores are off in one turn of 16 coordinates, as a share of what is there.

    They align the products of a turn to the largest and drop what is below a few bits beyond
    float32's. By how many, and of how many products, differs: the figures are twice what a model of
    an H100 (16 products, two bits), an A100 (8, one) and older ones (4, none) can lose.
    """
    if device.type != "cuda":
        return 2.0**-21
    generation, _ = torch.cuda.get_device_capability(device)
    return {9: 2.0**-21, 8: 2.0**-20}.get(generation, 2.0**-19)


def tolerances(dim: int, turn: float) -> dict[str, float]:
    """How far a score by one product, or by three, is off in what is added up, at most.

    Args:
        dim: of the points.
        turn: see `turn_error`.
    """
    turns, tile = width(dim) / 16, dims_at_once(dim) / 16
    # Adding half of the norm costs about a turn. The small products come first, but for points of
    # several tiles, whose small products are added to sums that are large already.
    return {"ONE": (turns + 1) * turn, "THREE": (tile + 3 * (turns - tile) + 1.5) * turn}


class Search:
    """Finds the nearest of `centroids` [k, s] to points; ties go to the lowest index."""

    def __init__(self, points: Points, centroids: torch.Tensor) -> None:
        k, dim = centroids.shape
        self._sources = points.sources()
        self._dim, self._width, device = dim, width(dim), centroids.device
        # MAX_INTEGER too, as points may lie further out than every centroid.
        reach = centroids.double().abs().amax().clamp(min=MAX_INTEGER / points.scale)
        # A power of two, by which scaling is exact.
        unit = torch.exp2(torch.log2(TOP / reach).floor())
        self._unit = (unit / points.scale).view(1)
        """float64 [1], by which the integers are multiplied."""
        tile = GROUPS if k <= GROUPS else GROUPS * _FOLD
        padded_k = triton.cdiv(k, tile) * tile
        padded = torch.zeros(padded_k, self._width, dtype=torch.float64, device=device)
        padded[:k, :dim] = centroids.double() * unit
        norms = padded.square().sum(1)
        half_norms = torch.full_like(norms, -torch.inf)  # so that padding is never the nearest
        half_norms[:k] = -0.5 * norms[:k]
        high = padded.half()
        low = (padded - high.double()).half()
        rest = padded - high.double()
        off_high = rest.square().sum(1).amax()
        off_both = (rest - low.double()).square().sum(1).amax()
        largest = norms.amax()
        reach = torch.stack([largest.sqrt(), largest / 2, off_high.sqrt(), off_both.sqrt()])
        self._reach = (reach * (1 + 2.0**-20)).float()
        """float32 [4]: the largest norm, half of its square, and how far the high halves, and both
        halves together, are off at most; a little more, as float32 may round them down."""
        self._halves, self._half_norms = (high, low), half_norms.float()
        self._exact_centroids = (padded, half_norms)
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
        shape = (n, self._width)
        halves = new(shape, dtype=torch.float16), new(shape, dtype=torch.float16)
        tolerance, bucket = new(n, 2, dtype=torch.float32), new(n, dtype=torch.uint8)
        self._split(first, halves, tolerance)
        self._best_group(halves[0], tolerance, bucket)
        # By bucket, so that a tile of points looks at the centroids of one group only.
        sorted_, order = torch.sort(bucket, stable=True)
        starts = torch.searchsorted(sorted_, self._buckets)
        ties = new(n), new(n), torch.zeros(1, dtype=torch.int32, device=out.device)
        self._second_look(
            halves, tolerance=tolerance, order=order, starts=starts, out=out, ties=ties
        )
        self._exact(first, ties, out)

    def _split(self, first: int, halves: Halves, tolerance: torch.Tensor) -> None:
        """Halves of the points from `first` on.

        `tolerance`, float32 [n, 2]: a lead of more is certain, in scores by the high halves and by
        both.
        """
        dim, points, n = self._dim, self._sources, len(tolerance)
        launch(
            kernels.split, (triton.cdiv(n, _SPLIT_POINTS),),
            *points.tensors, self._unit, self._reach, *halves, tolerance, first, n,
            **tolerances(dim, turn_error(tolerance.device)),
            DIM=dim, WIDTH=self._width, DIMS=dims_at_once(dim), POINTS=_SPLIT_POINTS,
            PAIRS=points.pairs,
        )  # fmt: skip

    def _best_group(
        self, high: torch.Tensor, tolerance: torch.Tensor, bucket: torch.Tensor
    ) -> None:
        """Groups of points by their high halves, into `bucket`, uint8 [n]."""
        k = len(self._half_norms)
        launch(
            kernels.best_group, (triton.cdiv(len(high), _POINTS),),
            high, tolerance, self._halves[0], self._half_norms, bucket, len(high), k,
            WIDTH=self._width, DIMS=dims_at_once(self._dim), POINTS=_POINTS, GROUPS=GROUPS,
            FOLD=_FOLD if k % (_FOLD * GROUPS) == 0 else 1,
            num_warps=_WARPS, num_stages=_STAGES,
        )  # fmt: skip

    def _second_look(
        self,
        halves: Halves,
        *,
        tolerance: torch.Tensor,
        order: torch.Tensor,
        starts: torch.Tensor,
        out: torch.Tensor,
        ties: Ties,
    ) -> None:
        """Nearest centroids by both halves, into `out`, int32 [n].

        Args:
            halves: of the points.
            tolerance: as `_split` writes it.
            order: int64 [n], points sorted by bucket.
            starts: int64 [GROUPS + 2], where each bucket starts in `order`.
            out: written.
            ties: written.
        """
        # As many tiles as the buckets can have, each of which may end in a part of one.
        tiles = triton.cdiv(len(order), _LOOK_POINTS) + GROUPS + 1
        launch(
            kernels.second_look, (tiles,),
            *halves, tolerance, *self._halves, self._half_norms, order, starts, out, *ties,
            len(self._half_norms),
            WIDTH=self._width, DIMS=dims_at_once(self._dim), POINTS=_LOOK_POINTS, GROUPS=GROUPS,
            num_warps=_LOOK_WARPS,
        )  # fmt: skip

    def _exact(self, first: int, ties: Ties, out: torch.Tensor) -> None:
        """Nearest centroids of the points in `ties`, by float64, into `out`."""
        dim, points = self._dim, self._sources
        # How many are tied is known to the device only; programs take turns at them.
        programs = min(_EXACT_PROGRAMS, triton.cdiv(len(out), _EXACT_POINTS))
        launch(
            kernels.exact, (programs,),
            *points.tensors, self._unit, *self._exact_centroids, *ties, out, first,
            len(self._half_norms),
            DIM=dim, WIDTH=self._width, DIMS=min(_EXACT_DIMS, dims_at_once(dim)),
            POINTS=_EXACT_POINTS, CENTROIDS=_EXACT_CENTROIDS, GROUPS=GROUPS, PAIRS=points.pairs,
        )  # fmt: skip
