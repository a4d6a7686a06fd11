"""Rows that reproduce given embeddings best: what a restart fills a fresh hash with."""

from __future__ import annotations

import torch

from benchmarks.quality.rows import means, sums

_ITERATIONS = 20
_SOLVED = 1e-12
"""Share of the squared residual at which it is."""


def fitted_rows(
    index: torch.Tensor, weights: torch.Tensor | None, targets: torch.Tensor, num_rows: int
) -> torch.Tensor:
    """Rows [R, s] whose weighted sums over `index` [N, p] are nearest to `targets` [N, s].

    With one row an id and no weights, each is the mean of the targets that share it, computed as
    such. Otherwise by conjugate gradients of the least squares problem, from zero.
    """
    if index.shape[1] == 1 and weights is None:
        return means(index[:, 0], targets, num_rows)
    exact = targets.double()
    ones = exact.new_ones(index.shape) if weights is None else weights.double()
    parts = [(index[:, p].contiguous(), ones[:, p : p + 1]) for p in range(index.shape[1])]

    def forward(rows: torch.Tensor) -> torch.Tensor:
        return torch.stack([w * rows[i] for i, w in parts]).sum(0)

    def backward(values: torch.Tensor) -> torch.Tensor:
        return torch.stack([sums(i, w * values, num_rows) for i, w in parts]).sum(0)

    rows = exact.new_zeros(num_rows, targets.shape[1])
    residual = backward(exact)
    direction, norm = residual, residual.square().sum()
    enough = _SOLVED * norm
    for _ in range(_ITERATIONS):
        # Where the solution is not unique, what rounding leaves would grow along the other ones.
        if norm <= enough:
            break
        image = backward(forward(direction))
        step = norm / (direction * image).sum()
        rows = rows + step * direction
        residual = residual - step * image
        before, norm = norm, residual.square().sum()
        direction = residual + norm / before * direction
    return rows.to(targets.dtype)
