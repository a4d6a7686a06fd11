"""Exact nearest centroids on tensor cores, in Triton.

The winner is that of float64, ties to the lowest index, however it is found and in whatever blocks:

1. `_split` writes points in float16, as a high and a low half, scaled to 256.
2. `_best_group` scores the high halves: one product and one maximum per score. Centroids are
   dealt into 32 groups (c modulo 32); what is kept of a point is the best score of each group.
   Where the best group leads by more than the rounding of float16 can be, the winner is in it.
3. `_second_look` scores by both halves (three products, 22 bits) the members of that group, with
   points sorted by group, so that it is a product of matrices again; points without a certain
   group look at all centroids. A lead within rounding is a tie.
4. `_exact` scores what is tied in float64.

They compile on CUDA, and under TRITON_INTERPRET=1 run on the CPU, where tests compare them with
float64 in torch. Nothing is read back by the host.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from cce_torchrec.gpu.launch import launch
from cce_torchrec.kmeans.gpu_blocks import dims_at_once, width
from cce_torchrec.kmeans.points import Sources

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


@triton.jit
def coordinates(  # type: ignore[no-untyped-def]  # Triton compiles it, types are its own
    main_ptr, helper_ptr, a_ptr, b_ptr, point, dims, inside, DIM: tl.constexpr, PAIRS: tl.constexpr
):  # fmt: skip
    """float32 [points, dims]: a point is a row, or the sum of one of each codebook."""
    on = inside[:, None] & (dims < DIM)[None, :]
    if PAIRS:
        a = tl.load(a_ptr + point, mask=inside, other=0).to(tl.int64)
        b = tl.load(b_ptr + point, mask=inside, other=0).to(tl.int64)
        x = tl.load(main_ptr + a[:, None] * DIM + dims[None, :], mask=on, other=0)
        return x + tl.load(helper_ptr + b[:, None] * DIM + dims[None, :], mask=on, other=0)
    else:
        return tl.load(main_ptr + point[:, None] * DIM + dims[None, :], mask=on, other=0)


@triton.jit(do_not_specialize=["first", "count"])
def _split(  # type: ignore[no-untyped-def]
    main_ptr, helper_ptr, a_ptr, b_ptr, unit_ptr, reach_ptr, high_ptr, low_ptr, tolerances_ptr,
    first, count, DIM: tl.constexpr, WIDTH: tl.constexpr, DIMS: tl.constexpr, POINTS: tl.constexpr,
    PAIRS: tl.constexpr, ONE: tl.constexpr, THREE: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * POINTS + tl.arange(0, POINTS)
    inside = at < count
    unit = tl.load(unit_ptr)
    norm = tl.zeros((POINTS,), tl.float32)
    off_high = tl.zeros((POINTS,), tl.float32)
    off_both = tl.zeros((POINTS,), tl.float32)
    for start in range(0, WIDTH, DIMS):
        dims = start + tl.arange(0, DIMS)
        x = coordinates(main_ptr, helper_ptr, a_ptr, b_ptr, first + at, dims, inside, DIM, PAIRS)
        x = (x.to(tl.float64) * unit).to(tl.float32)
        high = x.to(tl.float16)
        rest = x - high.to(tl.float32)
        low = rest.to(tl.float16)
        to = at[:, None] * WIDTH + dims[None, :]
        tl.store(high_ptr + to, high, mask=inside[:, None])
        tl.store(low_ptr + to, low, mask=inside[:, None])
        lost = rest - low.to(tl.float32)
        norm += tl.sum(x * x, axis=1)
        off_high += tl.sum(rest * rest, axis=1)
        off_both += tl.sum(lost * lost, axis=1)
    # Cauchy and Schwarz: |x . c - x' . c'| is at most |x - x'| |c| + |x'| |c - c'|.
    norm = tl.sqrt(norm)
    rounded = norm * 5.9604645e-08  # 2^-24: x itself, in float32
    off_high, off_both = tl.sqrt(off_high) + rounded, tl.sqrt(off_both) + rounded
    c_norm, half_norm = tl.load(reach_ptr), tl.load(reach_ptr + 1)
    c_off_high, c_off_both = tl.load(reach_ptr + 2), tl.load(reach_ptr + 3)
    added = norm * c_norm + half_norm
    one = off_high * c_norm + (norm + off_high) * c_off_high + ONE * added
    three = off_both * c_norm + (norm + off_both) * c_off_both + off_high * c_off_high
    # Twice, as two scores are compared, and a little for the rounding of all this.
    tl.store(tolerances_ptr + 2 * at, 2.02 * one, mask=inside)
    tl.store(tolerances_ptr + 2 * at + 1, 2.02 * (three + THREE * added), mask=inside)


@triton.jit
def _fold(scores, POINTS: tl.constexpr, GROUPS: tl.constexpr, FOLD: tl.constexpr):  # type: ignore[no-untyped-def]
    # The best of each group in a tile of several times as many centroids.
    return tl.max(tl.reshape(scores, (POINTS, FOLD, GROUPS)), axis=1)


@triton.jit(do_not_specialize=["count", "num_centroids"])
def _best_group(  # type: ignore[no-untyped-def]
    high_ptr, tolerances_ptr, c_ptr, half_norm_ptr, bucket_ptr, count, num_centroids,
    WIDTH: tl.constexpr, DIMS: tl.constexpr, POINTS: tl.constexpr, GROUPS: tl.constexpr,
    FOLD: tl.constexpr,
):  # fmt: skip
    TILE: tl.constexpr = GROUPS * FOLD
    rows = tl.program_id(0).to(tl.int64) * POINTS + tl.arange(0, POINTS)
    inside = rows < count
    tile, dims = tl.arange(0, TILE), tl.arange(0, DIMS)
    x_ptr = high_ptr + rows[:, None] * WIDTH + dims[None, :]
    c_ptr += tile[None, :] * WIDTH + dims[:, None]
    best = tl.full((POINTS, GROUPS), float("-inf"), tl.float32)
    if WIDTH == DIMS:
        x = tl.load(x_ptr, mask=inside[:, None], other=0.0)
        for first in range(0, num_centroids, TILE):
            scores = tl.dot(x, tl.load(c_ptr + first * WIDTH))
            scores += tl.load(half_norm_ptr + first + tile)[None, :]
            best = tl.maximum(best, _fold(scores, POINTS, GROUPS, FOLD))
    else:
        for first in range(0, num_centroids, TILE):
            scores = tl.zeros((POINTS, TILE), tl.float32)
            for start in range(0, WIDTH, DIMS):
                part = tl.load(x_ptr + start, mask=inside[:, None], other=0.0)
                scores = tl.dot(part, tl.load(c_ptr + first * WIDTH + start), scores)
            scores += tl.load(half_norm_ptr + first + tile)[None, :]
            best = tl.maximum(best, _fold(scores, POINTS, GROUPS, FOLD))
    columns = tl.arange(0, GROUPS)
    top = tl.max(best, axis=1)
    group = tl.min(tl.where(best == top[:, None], columns[None, :], GROUPS), axis=1)
    rest = tl.max(tl.where(columns[None, :] == group[:, None], float("-inf"), best), axis=1)
    certain = top - rest > tl.load(tolerances_ptr + 2 * rows, mask=inside, other=0.0)
    tl.store(bucket_ptr + rows, tl.where(certain, group + 1, 0).to(tl.uint8), mask=inside)


@triton.jit(do_not_specialize=["num_centroids"])
def _second_look(  # type: ignore[no-untyped-def]
    high_ptr, low_ptr, tolerances_ptr, c_high_ptr, c_low_ptr, half_norm_ptr, order_ptr,
    starts_ptr, out_ptr, ties_ptr, tied_bucket_ptr, num_ties_ptr, num_centroids,
    WIDTH: tl.constexpr, DIMS: tl.constexpr, POINTS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    # Which bucket is this program's, and which of its points: buckets are cut into tiles.
    buckets = tl.arange(0, 2 * GROUPS)
    begins = tl.load(starts_ptr + buckets, mask=buckets <= GROUPS, other=0)
    ends = tl.load(starts_ptr + buckets + 1, mask=buckets <= GROUPS, other=0)
    tiles = (ends - begins + POINTS - 1) // POINTS
    upto = tl.cumsum(tiles, axis=0)
    program = tl.program_id(0)
    own = tl.sum((upto <= program).to(tl.int32), axis=0)
    if own > GROUPS:
        return
    mine = buckets == own
    tile = program - tl.sum(tl.where(mine, upto - tiles, 0), axis=0)
    begin, end = tl.sum(tl.where(mine, begins, 0), axis=0), tl.sum(tl.where(mine, ends, 0), axis=0)
    at = begin + tile * POINTS + tl.arange(0, POINTS)
    inside = at < end
    rows = tl.load(order_ptr + at, mask=inside, other=0)
    # The centroids of bucket 0 are all, those of bucket g + 1 the members of group g.
    step = tl.where(own == 0, 1, GROUPS)
    base = tl.where(own == 0, 0, own - 1)
    members = num_centroids // step
    dims = tl.arange(0, DIMS)
    x_at = rows[:, None] * WIDTH + dims[None, :]
    best = tl.full((POINTS,), float("-inf"), tl.float32)
    second = tl.full((POINTS,), float("-inf"), tl.float32)
    index = tl.zeros((POINTS,), tl.int32)
    for first in range(0, members, GROUPS):
        member = first + tl.arange(0, GROUPS)
        real = member < members
        column = base + member * step
        scores = tl.zeros((POINTS, GROUPS), tl.float32)
        for start in range(0, WIDTH, DIMS):
            c_at = column[None, :] * WIDTH + start + dims[:, None]
            high = tl.load(high_ptr + x_at + start, mask=inside[:, None], other=0.0)
            low = tl.load(low_ptr + x_at + start, mask=inside[:, None], other=0.0)
            c_high = tl.load(c_high_ptr + c_at, mask=real[None, :], other=0.0)
            c_low = tl.load(c_low_ptr + c_at, mask=real[None, :], other=0.0)
            # The small products first, while what they are added to is small.
            scores = tl.dot(low, c_high, scores)
            scores = tl.dot(high, c_low, scores)
            scores = tl.dot(high, c_high, scores)
        half_norm = tl.load(half_norm_ptr + column, mask=real, other=float("-inf"))
        scores += half_norm[None, :]
        top = tl.max(scores, axis=1)
        where = tl.min(tl.where(scores == top[:, None], column[None, :], 2147483647), axis=1)
        rest = tl.where(column[None, :] == where[:, None], float("-inf"), scores)
        second = tl.maximum(tl.minimum(best, top), tl.maximum(second, tl.max(rest, axis=1)))
        index = tl.where(top > best, where, index)
        best = tl.maximum(best, top)
    tl.store(out_ptr + rows, index, mask=inside)
    tolerance = tl.load(tolerances_ptr + 2 * rows + 1, mask=inside, other=0.0)
    tied = inside & (best - second <= tolerance)
    slot = tl.atomic_add(num_ties_ptr + tl.zeros((POINTS,), tl.int32), 1, mask=tied)
    tl.store(ties_ptr + slot, rows.to(tl.int32), mask=tied)
    tl.store(tied_bucket_ptr + slot, tl.zeros((POINTS,), tl.int32) + own, mask=tied)


@triton.jit(do_not_specialize=["first", "num_centroids"])
def _exact(  # type: ignore[no-untyped-def]
    main_ptr, helper_ptr, a_ptr, b_ptr, unit_ptr, c_ptr, half_norm_ptr, ties_ptr, tied_bucket_ptr,
    num_ties_ptr, out_ptr, first, num_centroids,
    DIM: tl.constexpr, WIDTH: tl.constexpr, DIMS: tl.constexpr, POINTS: tl.constexpr,
    CENTROIDS: tl.constexpr, GROUPS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    count, unit = tl.load(num_ties_ptr), tl.load(unit_ptr)
    for turn in range(tl.program_id(0) * POINTS, count, tl.num_programs(0) * POINTS):
        slot = turn + tl.arange(0, POINTS)
        inside = slot < count
        row = tl.load(ties_ptr + slot, mask=inside, other=0).to(tl.int64)
        bucket = tl.load(tied_bucket_ptr + slot, mask=inside, other=1)
        step = tl.where(bucket == 0, 1, GROUPS)
        base = tl.where(bucket == 0, 0, bucket - 1)
        members = num_centroids // step
        best = tl.full((POINTS,), float("-inf"), tl.float64)
        index = tl.zeros((POINTS,), tl.int32)
        for start in range(0, tl.max(members, axis=0), CENTROIDS):
            member = start + tl.arange(0, CENTROIDS)
            column = base[:, None] + member[None, :] * step[:, None]
            real = inside[:, None] & (member[None, :] < members[:, None])
            scores = tl.load(half_norm_ptr + column, mask=real, other=float("-inf"))
            for begin in range(0, WIDTH, DIMS):
                dims = begin + tl.arange(0, DIMS)
                x = coordinates(main_ptr, helper_ptr, a_ptr, b_ptr, first + row, dims, inside,
                                 DIM, PAIRS).to(tl.float64) * unit  # fmt: skip
                c_at = column[:, :, None] * WIDTH + dims[None, None, :]
                c = tl.load(c_ptr + c_at, mask=real[:, :, None], other=0.0)
                scores += tl.sum(x[:, None, :] * c, axis=2)
            top = tl.max(scores, axis=1)
            where = tl.min(tl.where(scores == top[:, None], column, 2147483647), axis=1)
            index = tl.where(top > best, where, index)
            best = tl.maximum(best, top)
        tl.store(out_ptr + row, index, mask=inside)


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

    Adding half of the norm costs about a turn. The small products come first, but for points of
    several tiles, whose small products are added to sums that are large already.

    Args:
        dim: of the points.
        turn: see `turn_error`.
    """
    turns, tile = width(dim) / 16, dims_at_once(dim) / 16
    return {"ONE": (turns + 1) * turn, "THREE": (tile + 3 * (turns - tile) + 1.5) * turn}


def in_tiles(num_centroids: int) -> int:
    """`num_centroids` in whole tiles."""
    tile = GROUPS if num_centroids <= GROUPS else GROUPS * _FOLD
    return triton.cdiv(num_centroids, tile) * tile


def split(
    points: Sources,
    first: int,
    unit: torch.Tensor,
    reach: torch.Tensor,
    high: torch.Tensor,
    low: torch.Tensor,
    tolerance: torch.Tensor,
) -> None:
    """Writes the halves and tolerances of n points from `first` on.

    Args:
        points: integers of a common scale.
        first: a point.
        unit: float64 [1], by which the integers are multiplied.
        reach: float32 [4], of the centroids: the largest norm, half of its square, and how far
            their high halves, and both halves together, are off at most.
        high: float16 [n, width].
        low: float16 [n, width].
        tolerance: float32 [n, 2]: a lead of more is certain, in scores by the high halves and by
            both.
    """
    dim = points.dim
    launch(
        _split, (triton.cdiv(len(high), _SPLIT_POINTS),),
        *points.tensors, unit, reach, high, low, tolerance, first, len(high),
        **tolerances(dim, turn_error(high.device)),
        DIM=dim, WIDTH=width(dim), DIMS=dims_at_once(dim), POINTS=_SPLIT_POINTS,
        PAIRS=points.pairs,
    )  # fmt: skip


def best_group(
    high: torch.Tensor,
    tolerance: torch.Tensor,
    centroids: torch.Tensor,
    half_norms: torch.Tensor,
    bucket: torch.Tensor,
    dim: int,
) -> None:
    """Writes 1 + the group of each point's nearest centroid into `bucket`, 0 where in doubt.

    Args:
        high: float16 [n, width].
        tolerance: float32 [n, 2], as `split` writes it.
        centroids: float16 [k, width], k a multiple of GROUPS.
        half_norms: float32 [k], minus half of the squared norms; -inf is never the nearest.
        bucket: uint8 [n].
        dim: of the points.
    """
    launch(
        _best_group, (triton.cdiv(len(high), _POINTS),),
        high, tolerance, centroids, half_norms, bucket, len(high), len(centroids),
        WIDTH=width(dim), DIMS=dims_at_once(dim), POINTS=_POINTS, GROUPS=GROUPS,
        FOLD=_FOLD if len(centroids) % (_FOLD * GROUPS) == 0 else 1,
        num_warps=_WARPS, num_stages=_STAGES,
    )  # fmt: skip


def second_look(
    halves: tuple[torch.Tensor, torch.Tensor],
    tolerance: torch.Tensor,
    centroids: tuple[torch.Tensor, torch.Tensor],
    half_norms: torch.Tensor,
    order: torch.Tensor,
    starts: torch.Tensor,
    out: torch.Tensor,
    ties: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    dim: int,
) -> None:
    """Writes the nearest centroid of each point, by both halves, into `out`, int32 [n].

    Args:
        halves: of the points, as `split` writes them.
        tolerance: likewise.
        centroids: their halves, float16 [k, width].
        half_norms: as `best_group`.
        order: int64 [n], points sorted by bucket.
        starts: int64 [GROUPS + 2], where each bucket starts in `order`.
        out: int32 [n].
        ties: int32 [n] and [n], points whose lead is within rounding, and their buckets; their
            number, int32 [1], which is added to.
        dim: of the points.
    """
    launch(
        _second_look, (triton.cdiv(len(order), _LOOK_POINTS) + GROUPS + 1,),
        *halves, tolerance, *centroids, half_norms, order, starts, out, *ties, len(half_norms),
        WIDTH=width(dim), DIMS=dims_at_once(dim), POINTS=_LOOK_POINTS, GROUPS=GROUPS,
        num_warps=_LOOK_WARPS,
    )  # fmt: skip


def exact(
    points: Sources,
    first: int,
    unit: torch.Tensor,
    centroids: torch.Tensor,
    half_norms: torch.Tensor,
    ties: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    out: torch.Tensor,
) -> None:
    """Writes the nearest centroid of the points in `ties` into `out`, by float64.

    Args:
        points, first, unit: as `split`.
        centroids: float64 [k, width], k a multiple of GROUPS.
        half_norms: float64 [k].
        ties: as `second_look` leaves them.
        out: int32 [n].
    """
    dim = points.dim
    launch(
        _exact, (min(_EXACT_PROGRAMS, triton.cdiv(len(out), _EXACT_POINTS)),),
        *points.tensors, unit, centroids, half_norms, *ties, out, first, len(half_norms),
        DIM=dim, WIDTH=width(dim), DIMS=min(_EXACT_DIMS, dims_at_once(dim)), POINTS=_EXACT_POINTS,
        CENTROIDS=_EXACT_CENTROIDS, GROUPS=GROUPS, PAIRS=points.pairs,
    )  # fmt: skip
