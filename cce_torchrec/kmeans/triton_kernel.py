"""Nearest centroids in one Triton tile kernel: no [points, centroids] matrix in memory.

It compiles on CUDA, and under TRITON_INTERPRET=1 runs on the CPU, where tests compare it with
torch. Products are IEEE float32, not tf32, as in the other backends.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_POINTS = 64
_CENTROIDS = 64
_DIMS = 32
"""Most coordinates that are multiplied at once; wider points take several turns. With 64,
registers spill on sm_90 (ptxas)."""


def dims_at_once(dim: int) -> int:
    """Coordinates of a tile: a power of two, and at least 16, which a tile product takes."""
    return min(_DIMS, max(16, triton.next_power_of_2(dim)))


@triton.jit
def _nearest(  # type: ignore[no-untyped-def]  # Triton compiles it, types are its own
    x_ptr, c_ptr, half_norm_ptr, out_ptr, num_points, num_centroids,
    DIM: tl.constexpr, DIMS: tl.constexpr, POINTS: tl.constexpr, CENTROIDS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * POINTS + tl.arange(0, POINTS)
    inside = rows < num_points
    best = tl.full((POINTS,), float("-inf"), tl.float32)
    index = tl.zeros((POINTS,), tl.int32)
    for first in range(0, num_centroids, CENTROIDS):
        columns = first + tl.arange(0, CENTROIDS)
        real = columns < num_centroids
        products = tl.zeros((POINTS, CENTROIDS), tl.float32)
        for start in range(0, DIM, DIMS):
            dims = start + tl.arange(0, DIMS)
            x = tl.load(x_ptr + rows[:, None] * DIM + dims[None, :],
                        mask=inside[:, None] & (dims < DIM)[None, :], other=0.0)  # fmt: skip
            c = tl.load(c_ptr + columns[None, :] * DIM + dims[:, None],
                        mask=real[None, :] & (dims < DIM)[:, None], other=0.0)  # fmt: skip
            products = tl.dot(x, c, products, input_precision="ieee")
        half_norm = tl.load(half_norm_ptr + columns, mask=real, other=float("-inf"))
        scores = products + half_norm[None, :]
        top = tl.max(scores, axis=1)
        # Ties go to the lowest index: the first column of this tile that reaches its maximum.
        where = tl.min(tl.where(scores == top[:, None], columns[None, :], 2147483647), axis=1)
        better = top > best
        best = tl.where(better, top, best)
        index = tl.where(better, where, index)
    tl.store(out_ptr + rows, index, mask=inside)


def nearest(x: torch.Tensor, centroids: torch.Tensor, half_norms: torch.Tensor) -> torch.Tensor:
    """Index of the centroid with the highest x . c + half_norm(c), int32 [n].

    Shapes: x float32 [n, s], centroids [k, s], half_norms [k] = -|c|^2 / 2.
    """
    n, dim = x.shape
    out = torch.empty(n, dtype=torch.int32, device=x.device)
    if n:
        with torch.cuda.device_of(x):
            _nearest[(triton.cdiv(n, _POINTS),)](
                x.contiguous(), centroids.contiguous(), half_norms, out, n, len(centroids),
                DIM=dim, DIMS=dims_at_once(dim), POINTS=_POINTS, CENTROIDS=_CENTROIDS,
            )  # fmt: skip
    return out
