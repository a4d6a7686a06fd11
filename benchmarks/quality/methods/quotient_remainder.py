"""QR: a row of an id's quotient times, or plus, one of its remainder (Shi et al., KDD 2020)."""

from __future__ import annotations

import torch

from benchmarks.quality.budgets import FLOAT_BYTES, DoesNotFit
from benchmarks.quality.embedder import Embedder, Tables
from benchmarks.quality.least_squares import fitted_rows
from benchmarks.quality.rows import Block, Rows, means


class QuotientRemainder(Embedder):
    """Remainders by as large a divisor as the budget allows: the finest hash has most rows.

    The form is the operation, "times" or "plus". A restart renumbers the ids at random, as a hash
    is drawn anew, and fits the remainders' rows to the embeddings that there were; quotients start
    as the operation's neutral element.
    """

    def __init__(self, tables: Tables, *, restarts: bool) -> None:
        super().__init__(tables)
        self.restarts, self.multiplies = restarts, tables.form == "times"
        self.divisors = [
            _divisor(size, share.rows(tables.dim, at_least=2))
            for size, share in zip(tables.sizes, tables.shares, strict=True)
        ]
        self.quotients = [
            -(-size // divisor) for size, divisor in zip(tables.sizes, self.divisors, strict=True)
        ]
        middle = 1.0 if self.multiplies else 0.0
        shares = zip(self.divisors, self.quotients, tables.bounds, strict=True)
        blocks = []
        for divisor, quotients, bound in shares:
            # Around 1 by a tenth a product starts as varied as the hashed row alone.
            coarse = Block(quotients, 0.1 if self.multiplies else bound / 2**0.5, middle)
            blocks += [Block(divisor, bound if self.multiplies else bound / 2**0.5), coarse]
        self.rows = Rows(blocks, tables.dim, tables.training)
        self.index = self._index(0)

    def _index(self, drawn: int) -> torch.Tensor:
        """Rows [N, 2] of all ids: that of the remainder, then that of the quotient."""
        out = []
        for t, (size, divisor) in enumerate(zip(self.tables.sizes, self.divisors, strict=True)):
            generator = torch.Generator().manual_seed(1000 * self.tables.seed + 10 * t + drawn)
            order = torch.randperm(size, generator=generator)
            fine, coarse = self.rows.first[2 * t], self.rows.first[2 * t + 1]
            out.append(torch.stack([fine + order % divisor, coarse + order // divisor], dim=1))
        return torch.cat(out)

    def lookup(self, ids: torch.Tensor, training: bool) -> torch.Tensor:
        """See `Embedder`."""
        parts = self.rows.read(self.index.index_select(0, ids.reshape(-1)), training)
        return self._joined(parts).view(*ids.shape, self.tables.dim)

    def _joined(self, parts: torch.Tensor) -> torch.Tensor:
        return parts[:, 0] * parts[:, 1] if self.multiplies else parts.sum(1)

    def step(self) -> None:
        """See `Embedder`."""
        self.rows.step()

    def after(self, step: int) -> None:
        """The restart, when it is due."""
        if self.restarts and step == self.tables.restart_step:
            self.restart()

    @torch.no_grad()
    def restart(self) -> None:
        """Renumbers the ids; see the class."""
        rows = self.rows
        targets = self._joined(rows.weight[self.index])
        self.index = self._index(1)
        if self.multiplies:
            new = means(self.index[:, 0], targets, len(rows.weight))
            new[self.index[:, 1]] = 1.0
        else:
            new = fitted_rows(self.index, None, targets, len(rows.weight))
        rows.weight.copy_(new)
        rows.forget_state()

    @property
    def parameters(self) -> int:
        """See `Embedder`."""
        return self.rows.weight.numel()

    @property
    def training_bytes(self) -> int:
        """See `Embedder`."""
        return FLOAT_BYTES * (self.parameters + self.rows.state_values)


def _divisor(size: int, rows: int) -> int:
    """The largest divisor whose remainders and quotients are at most `rows` in all."""
    for divisor in range(min(size, rows - 1), 0, -1):
        if divisor + -(-size // divisor) <= rows:
            return divisor
    raise DoesNotFit(
        f"{rows} rows are fewer than remainders and quotients of {size:,} ids can have, about "
        f"{2 * size**0.5:.0f}"
    )
