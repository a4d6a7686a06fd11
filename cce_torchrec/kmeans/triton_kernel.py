"""Exact nearest centroids on tensor cores, in Triton.

The winner is that of float64, ties to the lowest index, however it is found and in whatever blocks:

1. `split` writes points in float16, as a high and a low half, scaled to 256.
2. `best_group` scores the high halves: one product and one maximum per score. Centroids are
   dealt into 32 groups (c modulo 32); what is kept of a point is the best score of each group.
   Where the best group leads by more than the rounding of float16 can be, the winner is in it.
3. `second_look` scores by both halves (three products, 22 bits) the members of that group, with
   points sorted by group, so that it is a product of matrices again; points without a certain
   group look at all centroids. A lead within rounding is a tie.
4. `exact` scores what is tied in float64.

They compile on CUDA, and under TRITON_INTERPRET=1 run on the CPU, where tests compare them with
float64 in torch. Nothing is read back by the host; triton_search.py launches them.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def coordinates(  # type: ignore[no-untyped-def]  # Triton compiles it, types are its own
    main_ptr, helper_ptr, a_ptr, b_ptr, point, dims, inside, DIM: tl.constexpr, PAIRS: tl.constexpr
):  # fmt: skip
    """int32 [points, dims]: a point is a row, or the sum of one of each codebook."""
    on = inside[:, None] & (dims < DIM)[None, :]
    if PAIRS:
        a = tl.load(a_ptr + point, mask=inside, other=0).to(tl.int64)
        b = tl.load(b_ptr + point, mask=inside, other=0).to(tl.int64)
        x = tl.load(main_ptr + a[:, None] * DIM + dims[None, :], mask=on, other=0)
        return x + tl.load(helper_ptr + b[:, None] * DIM + dims[None, :], mask=on, other=0)
    else:
        return tl.load(main_ptr + point[:, None] * DIM + dims[None, :], mask=on, other=0)


@triton.jit(do_not_specialize=["first", "count"])
def split(  # type: ignore[no-untyped-def]
    main_ptr, helper_ptr, a_ptr, b_ptr, unit_ptr, reach_ptr, high_ptr, low_ptr, tolerances_ptr,
    first, count, DIM: tl.constexpr, WIDTH: tl.constexpr, DIMS: tl.constexpr, POINTS: tl.constexpr,
    PAIRS: tl.constexpr, ONE: tl.constexpr, THREE: tl.constexpr,
):  # fmt: skip
    """Writes the halves of points in float16, and which leads of their scores are certain."""
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
def best_group(  # type: ignore[no-untyped-def]
    high_ptr, tolerances_ptr, c_ptr, half_norm_ptr, bucket_ptr, count, num_centroids,
    WIDTH: tl.constexpr, DIMS: tl.constexpr, POINTS: tl.constexpr, GROUPS: tl.constexpr,
    FOLD: tl.constexpr,
):  # fmt: skip
    """Writes 1 + the group of each point's nearest centroid, 0 where in doubt."""
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
def second_look(  # type: ignore[no-untyped-def]
    high_ptr, low_ptr, tolerances_ptr, c_high_ptr, c_low_ptr, half_norm_ptr, order_ptr,
    starts_ptr, out_ptr, ties_ptr, tied_bucket_ptr, num_ties_ptr, num_centroids,
    WIDTH: tl.constexpr, DIMS: tl.constexpr, POINTS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Writes the nearest centroid of each point by both halves, and which points are tied."""
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
def exact(  # type: ignore[no-untyped-def]
    main_ptr, helper_ptr, a_ptr, b_ptr, unit_ptr, c_ptr, half_norm_ptr, ties_ptr, tied_bucket_ptr,
    num_ties_ptr, out_ptr, first, num_centroids,
    DIM: tl.constexpr, WIDTH: tl.constexpr, DIMS: tl.constexpr, POINTS: tl.constexpr,
    CENTROIDS: tl.constexpr, GROUPS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Writes the nearest centroid of the points that are tied, by float64."""
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
