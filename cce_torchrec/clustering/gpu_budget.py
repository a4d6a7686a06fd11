"""Memory of a chunk's clustering on a GPU, stage by stage, as the Triton kernels need it.

What is allocated at once is listed where it is counted; `benchmarks.gpu` holds the sums against
what torch's allocator has seen.
"""

from __future__ import annotations

import math

from cce_torchrec.kmeans.gpu_blocks import bytes_per_point, points_at_once

CELLS_PER_ID = 8
"""Up to so many cells k * k' an id, pairs are counted in a table of all cells."""
_PAIR = 20
"""Bytes a pair while K-means runs: weight (8), main and helper row (4 + 4), assignment (4)."""
_LISTED = 72
"""Bytes an id whose pairs are listed: keys, sorted keys and positions, inverse, counts."""


def distinct_pairs(num_ids: int, cells: int) -> int:
    """About the most pairs that occur: as many as `num_ids` uniform draws of `cells` hit.

    Helper rows are drawn by hash, and uneven codes hit fewer; the spread is below a thousandth.
    """
    expected = cells * -math.expm1(-num_ids / cells)
    return min(num_ids, cells, round(1.005 * expected) + 1024)


def search_bytes(points: int, dim: int) -> int:
    """While the nearest centroids of `points` are found, in blocks."""
    return min(points, points_at_once(dim)) * bytes_per_point(dim)


def by_cells(*, num_ids: int, cells: int, dim: int, code: int, weighted: bool) -> int:
    """Where pairs are counted in a table over all `cells`; `code`: bytes of a code."""
    pairs = distinct_pairs(num_ids, cells)
    # Counts (int32, and int64 weights beside), then keys and counts of the pairs.
    counting = 4 * cells + 8 * cells * weighted + 16 * pairs
    # The code of every cell is made while points and assignments are there.
    relabelling = _PAIR * pairs + code * (cells + pairs)
    return max(counting, _PAIR * pairs + search_bytes(pairs, dim), relabelling)


def by_list(ids: int, dim: int, weighted: bool) -> int:
    """Where the pairs of `ids` are listed and sorted."""
    listing = (_LISTED + 16 * weighted) * ids
    return max(listing, (_PAIR + 8) * ids + search_bytes(ids, dim))


def by_id(ids: int, dim: int) -> int:
    """Where ids get their codes block by block: main and helper rows, assignment, codes."""
    return search_bytes(ids, dim) + min(ids, points_at_once(dim)) * (8 + 4 + 4)
