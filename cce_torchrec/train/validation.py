"""Log loss and AUC on examples that validate, in memory that does not grow with their number."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

from cce_torchrec.collectives import gather
from cce_torchrec.metrics import BINS, add_logits, auc, histogram_auc
from cce_torchrec.train.job import Batch

EXACT_ROWS = 1 << 22
"""Up to so many examples of all ranks the AUC is exact; of more it is one of a histogram."""


@dataclass(frozen=True)
class Score:
    """What a validation found, the same on every rank."""

    log_loss: float
    auc: float
    examples: int


class Predictions:
    """Takes the predictions of this rank, and scores those of all.

    Args:
        exact_rows: of all ranks together, whose predictions are kept for an exact AUC.
    """

    def __init__(self, exact_rows: int = EXACT_ROWS) -> None:
        self._room = exact_rows // dist.get_world_size()
        self._kept: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._histogram = torch.zeros(2 * BINS, dtype=torch.int64, device="cpu")
        self._loss, self._rows = 0.0, 0
        self._folded = False

    def add(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Takes logits [n] and labels [n], on the host."""
        losses = binary_cross_entropy_with_logits(logits.double(), labels.double(), reduction="sum")
        self._loss += float(losses)
        self._rows += len(labels)
        self._kept.append((logits, labels))
        if self._folded or self._rows > self._room:
            self._fold()

    def _fold(self) -> None:
        for logits, labels in self._kept:
            add_logits(self._histogram, logits, labels)
        self._kept, self._folded = [], True

    def score(self) -> Score:
        """Of all ranks. Collective."""
        by_rank = gather((self._loss, self._rows, self._folded), dist.group.WORLD)
        rows = sum(own for _, own, _ in by_rank)
        mean = sum(loss for loss, _, _ in by_rank) / rows if rows else float("nan")
        # The AUC is one of all pairs of rows, and no mean of the ranks' own.
        if any(folded for _, _, folded in by_rank):
            self._fold()
            parts = gather(self._histogram, dist.group.WORLD)
            return Score(mean, histogram_auc(torch.stack(parts).sum(0))[0], rows)
        none = torch.zeros(0, device="cpu")
        own = tuple(torch.cat(part) for part in zip((none, none), *self._kept, strict=True))
        everyone = gather(own, dist.group.WORLD)
        logits, labels = (torch.cat(part) for part in zip(*everyone, strict=True))
        return Score(mean, auc(logits, labels) if rows else float("nan"), rows)


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[Batch], device: torch.device) -> Score:
    """Scores a model in training, which it goes on with, on this rank's `batches`. Collective."""
    predictions = Predictions()
    model.eval()
    for batch in batches:
        _, (_, logits, _) = model(batch.to(device, non_blocking=True))
        predictions.add(logits.cpu(), batch.labels)
    model.train()
    return predictions.score()
