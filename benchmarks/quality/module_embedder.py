"""Methods that are a torch module for each table, trained by one dense optimizer."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import nn

from benchmarks.quality.budgets import FLOAT_BYTES
from benchmarks.quality.embedder import Embedder, Tables
from benchmarks.quality.rows import Training


def dense_optimizer(parameters: list[nn.Parameter], training: Training) -> torch.optim.Optimizer:
    """torch's optimizer of whole tensors."""
    if training.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=training.rate, fused=True)
    return torch.optim.Adagrad(parameters, lr=training.rate, eps=1e-8, fused=True)


class ModuleEmbedder(Embedder):
    """One module for each table: ids [n] of the table become embeddings [n, D]."""

    def __init__(self, tables: Tables) -> None:
        super().__init__(tables)
        self.modules = nn.ModuleList(self.module(t) for t in range(len(tables.sizes)))
        self.optimizer = dense_optimizer(list(self.modules.parameters()), tables.training)

    @abstractmethod
    def module(self, table: int) -> nn.Module:
        """The module of one of the tables, within its share.

        Raises:
            DoesNotFit: the share is too small.
        """

    def lookup(self, ids: torch.Tensor, training: bool) -> torch.Tensor:
        """See `Embedder`."""
        self.modules.train(training)
        columns = [
            module(ids[:, t] - first)
            for t, (module, first) in enumerate(zip(self.modules, self.tables.first, strict=True))
        ]
        return torch.stack(columns, dim=1)

    def step(self) -> None:
        """See `Embedder`."""
        self.optimizer.step()
        self.optimizer.zero_grad()

    @property
    def parameters(self) -> int:
        """See `Embedder`; with the running averages of normalisations, which serving reads."""
        buffers = [b for b in self.modules.buffers() if b.is_floating_point()]
        return sum(p.numel() for p in [*self.modules.parameters(), *buffers])

    @property
    def training_bytes(self) -> int:
        """See `Embedder`."""
        states = 2 if self.tables.training.optimizer == "adam" else 1
        trained = sum(p.numel() for p in self.modules.parameters())
        return FLOAT_BYTES * (self.parameters + states * trained)
