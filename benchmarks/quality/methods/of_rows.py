"""What methods have in common whose tables are rows that are looked up, and nothing else."""

from __future__ import annotations

from abc import abstractmethod

import torch

from benchmarks.quality.budgets import FLOAT_BYTES
from benchmarks.quality.embedder import Embedder
from benchmarks.quality.rows import Rows


class OfRows(Embedder):
    """Tables of `rows` alone: hashes are computed, and take no memory."""

    rows: Rows

    def step(self) -> None:
        """See `Embedder`."""
        self.rows.step()

    @property
    def parameters(self) -> int:
        """See `Embedder`."""
        return self.rows.weight.numel()

    @property
    def training_bytes(self) -> int:
        """See `Embedder`."""
        return FLOAT_BYTES * (self.parameters + self.rows.state_values)


class RestartedRows(OfRows):
    """Such tables that may be restarted once, if `restarts`."""

    restarts: bool

    def after(self, step: int) -> None:
        """The restart, when it is due."""
        if self.restarts and step == self.tables.restart_step:
            with torch.no_grad():
                self.rows.weight.copy_(self.restarted())
                self.rows.forget_state()

    @abstractmethod
    def restarted(self) -> torch.Tensor:
        """Draws the hash anew; the weight of the rows that it leads to."""
