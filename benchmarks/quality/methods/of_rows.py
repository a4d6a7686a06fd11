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


class Restarted(Embedder):
    """A method whose hash is drawn anew when the package would cluster, if `restarts`."""

    restarts: bool
    drawn = 0
    """How often it was."""

    def after(self, step: int) -> None:
        """The restart, when one is due."""
        if self.restarts and step in self.tables.restart_steps:
            self.drawn += 1
            with torch.no_grad():
                self.restart()

    @abstractmethod
    def restart(self) -> None:
        """Goes over to the hash that was drawn as number `drawn`."""


class RestartedRows(OfRows, Restarted):
    """Tables of rows alone with restarts."""

    def restart(self) -> None:
        """See `Restarted`."""
        self.rows.weight.copy_(self.restarted())
        self.rows.forget_state()

    @abstractmethod
    def restarted(self) -> torch.Tensor:
        """Goes over to the hash of number `drawn`; the weight of the rows that it leads to."""
