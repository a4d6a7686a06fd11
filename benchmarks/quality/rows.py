"""Rows that are looked up and trained, and the tables that are made of them.

A step gathers the rows of a batch, and adds up their gradients before one update of each row, as
FBGEMM's fused kernels do; tests compare it with the package's own collection. TorchRec's step of 4
to 6 ms would be most of a run of 2,300 small batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

_EPSILON = 1e-8
_SPARSE_FROM = 16
"""Times more rows than are looked up, from which rows are updated one by one."""
DENSE: dict[str, type[torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}


@dataclass(frozen=True)
class Training:
    """How the compressed tables are trained."""

    optimizer: str
    """rowwise_adagrad, adagrad, adam or adamw; the last two step all rows, read or not."""
    rate: float


@dataclass(frozen=True)
class Block:
    """Rows that start alike and share what a restart makes of their state."""

    rows: int
    bound: float
    """They start uniform between minus and plus this, around `middle`."""
    middle: float = 0.0


class Rows:
    """Weight [R, s] in blocks, and the state of its optimizer."""

    def __init__(self, blocks: Sequence[Block], width: int, training: Training) -> None:
        self.blocks = list(blocks)
        self.training = training
        self.weight = torch.cat(
            [torch.empty(b.rows, width).uniform_(-b.bound, b.bound) + b.middle for b in blocks]
        )
        self.first = _starts([b.rows for b in blocks])
        """Of each block."""
        columns = 1 if training.optimizer == "rowwise_adagrad" else width
        self.state = torch.zeros(len(self.weight), columns)
        self.adam: torch.optim.Optimizer | None = None
        if training.optimizer in DENSE:
            self.weight.requires_grad_()
            self.adam = DENSE[training.optimizer]([self.weight], lr=training.rate, fused=True)
        self._read: list[tuple[torch.Tensor, torch.Tensor]] = []

    @property
    def width(self) -> int:
        """Values of a row."""
        return self.weight.shape[1]

    @property
    def state_values(self) -> int:
        """Numbers that the optimizer keeps."""
        return 2 * self.weight.numel() if self.adam else self.state.numel()

    def read(self, rows: torch.Tensor, training: bool) -> torch.Tensor:
        """The rows [..., s] of `rows` [...]; with `training` the next `step` updates them."""
        flat = rows.reshape(-1)
        values = self.weight.detach().index_select(0, flat).requires_grad_(training)
        if training:
            self._read.append((flat, values))
        return values.view(*rows.shape, self.width)

    def step(self) -> None:
        """One optimizer step by the gradients of what was read since the last."""
        reads, self._read = self._read, []
        reads = [(rows, values) for rows, values in reads if values.grad is not None]
        if not reads:
            return
        rows = torch.cat([r for r, _ in reads]) if len(reads) > 1 else reads[0][0]
        grads = [values.grad for _, values in reads]
        self._update(rows, torch.cat(grads) if len(grads) > 1 else grads[0])

    def _update(self, rows: torch.Tensor, grads: torch.Tensor) -> None:
        if self.adam is not None:
            self.weight.grad = sums(rows, grads, len(self.weight))
            self.adam.step()
            return
        if len(self.weight) < _SPARSE_FROM * len(rows):
            total = sums(rows, grads, len(self.weight))
            self.state += self._squares(total)
            self.weight.addcdiv_(total, self.state.sqrt() + _EPSILON, value=-self.training.rate)
            return
        own, inverse = torch.unique(rows, return_inverse=True)
        total = sums(inverse, grads, len(own))
        state = self.state.index_select(0, own) + self._squares(total)
        self.state.index_copy_(0, own, state)
        moved = self.weight.index_select(0, own)
        moved.addcdiv_(total, state.sqrt() + _EPSILON, value=-self.training.rate)
        self.weight.index_copy_(0, own, moved)

    def _squares(self, total: torch.Tensor) -> torch.Tensor:
        squares = total.square()
        return squares.mean(1, keepdim=True) if self.state.shape[1] < self.width else squares

    def forget_state(self, share: float = 0.1, first_block: int = 0) -> None:
        """From the `first_block` on, all rows of a block get `share` of the mean of its state.

        Adam's first moment becomes zero and its second one its mean: it forgets by itself, and a
        small one beside the running count of steps would make steps of several times the rate.
        """
        if self.adam is not None:
            kept = self.adam.state[self.weight]
            for block in self.blocks_of(kept["exp_avg_sq"])[first_block:]:
                block.copy_(block.mean(0, keepdim=True).expand_as(block))
            kept["exp_avg"].zero_()
            return
        for block in self.blocks_of(self.state)[first_block:]:
            block.copy_((share * block.mean(0, keepdim=True)).expand_as(block))

    def blocks_of(self, values: torch.Tensor) -> list[torch.Tensor]:
        """Views of `values` [R, ...], block by block."""
        return list(values.split([b.rows for b in self.blocks]))


def sums(rows: torch.Tensor, grads: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Sums [num_rows, s] of `grads` [M, s] by `rows` [M]."""
    return grads.new_zeros(num_rows, grads.shape[1]).index_add_(0, rows, grads)


def means(rows: torch.Tensor, values: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Mean [num_rows, s] of the `values` [N, s] of each row of `rows` [N]; 0 of none."""
    counts = torch.bincount(rows, minlength=num_rows).clamp(min=1)
    return sums(rows, values, num_rows) / counts[:, None]


def _starts(counts: Sequence[int]) -> list[int]:
    starts = [0]
    for count in counts:
        starts.append(starts[-1] + count)
    return starts[:-1]
