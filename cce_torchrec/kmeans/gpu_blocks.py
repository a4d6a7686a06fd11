"""How many points a GPU searches at once, and what that takes; known without Triton."""

from __future__ import annotations

_MOST_DIMS = 64
"""Most coordinates that are multiplied at once; wider points take several turns."""
BLOCK_BYTES = 1 << 29
"""About what a block of points may take."""


def dims_at_once(dim: int) -> int:
    """Coordinates of a tile: a power of two, and at least 16, which a tile product takes."""
    return min(_MOST_DIMS, max(16, 1 << (dim - 1).bit_length()))


def width(dim: int) -> int:
    """`dim` padded to whole tiles."""
    dims = dims_at_once(dim)
    return -(-dim // dims) * dims


def bytes_per_point(dim: int) -> int:
    """Of a search: two halves in float16; norm, bucket, ties; what sorting the buckets takes."""
    return 4 * width(dim) + 4 + 1 + 8 + 26


def points_at_once(dim: int) -> int:
    """Points of a block, a multiple of 2^16."""
    return max(1, BLOCK_BYTES // bytes_per_point(dim) >> 16) << 16
