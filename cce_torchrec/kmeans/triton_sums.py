"""The sums of clusters by Triton: integers, which any order of adding leaves the same."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from cce_torchrec.gpu.launch import launch
from cce_torchrec.kmeans.gpu_blocks import dims_at_once, width
from cce_torchrec.kmeans.sources import Sources, Sums
from cce_torchrec.kmeans.triton_kernel import coordinates

_POINTS = 64


@triton.jit
def _add_rows(sums_ptr, cluster, rows, chosen, cell, on):  # type: ignore[no-untyped-def]
    # The chosen rows are of one cluster: their sum is added at once.
    total = tl.sum(tl.where(chosen[:, None], rows, 0), axis=0)
    tl.atomic_add(sums_ptr + cluster + cell, total, mask=on, sem="relaxed")


@triton.jit
def _add_values(sums_ptr, cluster, values, chosen):  # type: ignore[no-untyped-def]
    tl.atomic_add(
        sums_ptr + cluster, tl.sum(tl.where(chosen, values, 0), axis=0), sem="relaxed"
    )  # fmt: skip


@triton.jit(do_not_specialize=["first", "count"])
def _accumulate(  # type: ignore[no-untyped-def]
    main_ptr, helper_ptr, a_ptr, b_ptr, weights_ptr, order_ptr, clusters_ptr, c_ptr, scales_ptr,
    sums_ptr, sizes_ptr, errors_ptr, first, count,
    DIM: tl.constexpr, WIDTH: tl.constexpr, DIMS: tl.constexpr, POINTS: tl.constexpr,
    PAIRS: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * POINTS
    at = start + tl.arange(0, POINTS)
    inside = at < count
    cluster = tl.load(clusters_ptr + at, mask=inside, other=0).to(tl.int64)
    # Points come by cluster, so that most of these are of the first one's or of the last one's:
    # the sums of both are added at once, and one by one only what lies between.
    head = tl.load(clusters_ptr + start).to(tl.int64)
    tail = tl.load(clusters_ptr + tl.minimum(start + POINTS, count) - 1).to(tl.int64)
    ahead, behind = inside & (cluster == head), inside & (cluster == tail) & (tail != head)
    between = inside & (cluster != head) & (cluster != tail)
    point = first + tl.load(order_ptr + at, mask=inside, other=0)
    weight = tl.load(weights_ptr + point, mask=inside, other=0)
    unit, error_scale = tl.load(scales_ptr), tl.load(scales_ptr + 1)
    error = tl.zeros((POINTS,), tl.float64)
    for begin in range(0, WIDTH, DIMS):
        dims = begin + tl.arange(0, DIMS)
        real = dims < DIM
        x = coordinates(main_ptr, helper_ptr, a_ptr, b_ptr, point, dims, inside, DIM, PAIRS)
        weighted = x.to(tl.int64) * weight[:, None]
        _add_rows(sums_ptr, head * DIM, weighted, ahead, dims, real)
        if tail != head:
            _add_rows(sums_ptr, tail * DIM, weighted, behind, dims, real)
        cell = cluster[:, None] * DIM + dims[None, :]
        alone = between[:, None] & real[None, :]
        tl.atomic_add(sums_ptr + cell, weighted, mask=alone, sem="relaxed")
        on = inside[:, None] & real[None, :]
        center = tl.load(c_ptr + cell, mask=on, other=0.0).to(tl.float64)
        off = tl.where(on, x.to(tl.float64) * unit - center, 0.0)
        error += tl.sum(off * off, axis=1)
    rounded = (error * error_scale + 0.5).to(tl.int64) * weight
    _add_values(sizes_ptr, head, weight, ahead)
    _add_values(errors_ptr, head, rounded, ahead)
    if tail != head:
        _add_values(sizes_ptr, tail, weight, behind)
        _add_values(errors_ptr, tail, rounded, behind)
    tl.atomic_add(sizes_ptr + cluster, weight, mask=between, sem="relaxed")
    tl.atomic_add(errors_ptr + cluster, rounded, mask=between, sem="relaxed")


def accumulate(
    points: Sources,
    first: int,
    *,
    weights: torch.Tensor,
    nearest: torch.Tensor,
    centroids: torch.Tensor,
    scales: torch.Tensor,
    stats: Sums,
) -> None:
    """Adds the points from `first` on to their clusters' sums, sizes and errors (all int64).

    Args:
        points: integers of a common scale.
        first: the point that `nearest` starts with.
        weights: int64 [num_points].
        nearest: int32 [n], cluster of each.
        centroids: float32 [k, dim].
        scales: float64 [2]: one over the scale of the integers, and that of squared distances.
        stats: int64 [k, dim], [k] and [k].
    """
    dim = points.dim
    clusters, order = torch.sort(nearest)
    launch(
        _accumulate, (triton.cdiv(len(nearest), _POINTS),),
        *points.tensors, weights, order, clusters, centroids, scales, *stats, first, len(nearest),
        DIM=dim, WIDTH=width(dim), DIMS=dims_at_once(dim), POINTS=_POINTS,
        PAIRS=points.pairs,
    )  # fmt: skip
