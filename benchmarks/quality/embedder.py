"""What every method is: compressed tables that are looked up, trained, and counted in bytes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from benchmarks.quality.budgets import FLOAT_BYTES, Share
from benchmarks.quality.rows import Training
from cce_torchrec import ClusteringSchedule


@dataclass(frozen=True, kw_only=True)
class Tables:
    """The tables that a method replaces, and what it may know before training."""

    names: list[str]
    sizes: list[int]
    """Ids of each."""
    shares: list[Share]
    """What each may take."""
    bounds: list[float]
    """Full tables would start uniform between minus and plus these."""
    dim: int
    seed: int
    training: Training
    form: str = ""
    """Of the method, where it has several."""
    counts: list[torch.Tensor]
    """Training examples in one pass of each id of each table."""
    steps: int
    """Of the whole run."""
    passes: int
    model: str
    """Of the network: dlrm, or gmf, which multiplies two embeddings and nothing else."""
    all_rare: bool
    """Whether the package takes the ids of all tables that are replaced for rare ones."""

    @property
    def num_ids(self) -> int:
        """Of all tables; lookups are by ids that count on from table to table."""
        return sum(self.sizes)

    @property
    def first(self) -> list[int]:
        """The first id of each table."""
        return [sum(self.sizes[:i]) for i in range(len(self.sizes))]

    @property
    def restart_steps(self) -> frozenset[int]:
        """The steps after which restarts come: those that the package gives tables with codes."""
        schedule = ClusteringSchedule.for_training(
            self.passes, self.steps // self.passes, rare=self.all_rare
        )
        return schedule.steps

    @property
    def examples(self) -> list[float]:
        """Training examples an id of each table in a pass."""
        pairs = zip(self.counts, self.sizes, strict=True)
        return [float(counts.sum()) / size for counts, size in pairs]


class Embedder(ABC):
    """The tables of a method, trained step by step."""

    def __init__(self, tables: Tables) -> None:
        self.tables = tables

    @abstractmethod
    def lookup(self, ids: torch.Tensor, training: bool) -> torch.Tensor:
        """Embeddings [B, F, D] of `ids` [B, F], numbered on from table to table."""

    @abstractmethod
    def step(self) -> None:
        """One optimizer step by the gradients of the lookups since the last."""

    def after(self, step: int) -> None:  # noqa: B027  # most methods do nothing then
        """What the method does between steps: clusterings, a restart, moving ids."""

    def before_evaluation(self) -> None:  # noqa: B027  # as above
        """Makes what is evaluated, where that is not what is trained."""

    def penalty(self) -> torch.Tensor | None:
        """What is added to the loss of a step, after its lookup."""
        return None

    @property
    def made(self) -> str:
        """What came of the budget, where the method chooses."""
        return ""

    @property
    @abstractmethod
    def parameters(self) -> int:
        """Trained values that serving keeps."""

    @property
    def stored_bytes(self) -> int:
        """Codes and indices that serving keeps, packed."""
        return 0

    @property
    @abstractmethod
    def training_bytes(self) -> int:
        """Values, optimizer state, codes and whatever else is held while it trains."""

    @property
    def table_bytes(self) -> int:
        """All that serving keeps of the tables."""
        return FLOAT_BYTES * self.parameters + self.stored_bytes
