"""How far a job is: its steps are counted, and it clusters and saves after those that ask for it.

Of a loop of training nothing else is needed: which batch comes next follows from the steps.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from cce_torchrec.checkpoint.folder import latest_checkpoint
from cce_torchrec.checkpoint.info import checkpoint_info
from cce_torchrec.checkpoint.load import load_checkpoint
from cce_torchrec.checkpoint.save import save_checkpoint
from cce_torchrec.checkpoint.schedulers import loader, saved_schedulers
from cce_torchrec.clustering.schedule import ClusteringSchedule
from cce_torchrec.collectives import Ranks, same_task

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class TrainingProgress:
    """Counts the steps of a job, clusters and saves when it is time, and goes on after a restart.

    It is made on every rank once the model is sharded and its optimizers are there, and loads the
    latest checkpoint in `folder` if there is one: model, optimizers, schedulers, random state, and
    the number of steps. `advance()` is called on every rank after every step. A loop that begins at
    `epoch` and, there, at the batch `step_in_epoch`, trains the steps that are left; where none
    are, because training had ended or there are no `epochs`, the model is there to be evaluated.

    Raises:
        ValueError: on every rank, before anything is loaded: numbers that are no number of steps,
            that differ between ranks, no checkpoint where there are no epochs, or schedulers other
            than those in the checkpoint; and what `load_checkpoint` and `save_checkpoint` raise.
    """

    folder: str | Path
    """Shared by all ranks; holds the checkpoints of this job alone."""
    model: nn.Module
    optimizers: Sequence[torch.optim.Optimizer]
    """Those that the job steps."""
    schedulers: Sequence[LRScheduler] = ()
    """Of learning rates, torch's or others with its `state_dict`."""
    epochs: int = field(kw_only=True)
    steps_per_epoch: int = field(kw_only=True)
    """Batches of an epoch, `len(dataloader)`; of ranks that have unequal numbers the least."""
    save_every: int = field(default=1000, kw_only=True)
    """Steps from one checkpoint to the next. The end of each epoch has one too."""
    schedule: ClusteringSchedule | None = field(default=None, kw_only=True)
    """By default `ClusteringSchedule.evenly` over all epochs, the last of which finalizes."""
    clustering: Mapping[str, Any] = field(default_factory=dict, kw_only=True)
    """Options of `cluster`, by name; `optimizer` is that of a job which has one, by default."""
    step: int = field(default=0, init=False)
    """Steps so far."""

    def __post_init__(self) -> None:
        ranks = Ranks(None)
        same_task(self._numbers, "epochs, save_every, schedule", ranks.group)
        # Every step is collective, so that no rank takes more than the one with the fewest.
        self.steps_per_epoch = min(ranks.agree(lambda: self.steps_per_epoch))
        total = self.epochs * self.steps_per_epoch
        default = ClusteringSchedule.evenly(total, finalize=True) if total else None
        self._when = self.schedule or default or ClusteringSchedule.never()
        # Data-parallel and unsharded tables need it; of several, the job alone knows which.
        if len(self.optimizers) == 1:
            self.clustering = {"optimizer": self.optimizers[0], **self.clustering}
        # Now, as what cannot be saved would else be found when hours of training are to be.
        ranks.agree(self._extra)
        # Without an epoch to train there has to be one, or an untrained model would be evaluated.
        if self.epochs == 0 or ranks.first(lambda: latest_checkpoint(self.folder)) is not None:
            self._resume(ranks)

    def _numbers(self) -> tuple[None, tuple[int, int, ClusteringSchedule | None]]:
        if self.epochs < 0 or self.save_every < 1 or self.steps_per_epoch < 1:
            raise ValueError(
                f"epochs {self.epochs}, steps_per_epoch {self.steps_per_epoch} and save_every "
                f"{self.save_every}: epochs are 0 or more, and the others 1 or more"
            )
        return None, (self.epochs, self.save_every, self.schedule)

    @property
    def epoch(self) -> int:
        """Epochs that are done, which is the number of the one to go on with, counted from 0."""
        return self.step // self.steps_per_epoch

    @property
    def step_in_epoch(self) -> int:
        """Steps of that epoch that are done, which is the number of its batches to leave out."""
        return self.step % self.steps_per_epoch

    def advance(self) -> None:
        """Counts a step; then clusters, finalizes and saves if it is time. Collective."""
        self.step += 1
        self._when.cluster_if_due(self.model, self.step, **self.clustering)
        if self.step % self.save_every == 0 or self.step_in_epoch == 0:
            self.save()

    def save(self) -> None:
        """Saves a checkpoint of now; `advance` calls it. Collective."""
        save_checkpoint(
            self.folder,
            self.model,
            step=self.step,
            optimizers=self.optimizers,
            schedule=self._when,
            extra=self._extra(),
        )

    def _extra(self) -> dict[str, Any]:
        return {
            "steps_per_epoch": self.steps_per_epoch,
            "schedulers": saved_schedulers(self.schedulers),
        }

    def _resume(self, ranks: Ranks) -> None:
        """Takes over the latest checkpoint."""
        info = ranks.first(lambda: checkpoint_info(self.folder))
        saved = info.extra or {}
        # Checked before the load, which writes into the model.
        load_schedulers = ranks.each(lambda: loader(self.schedulers, saved.get("schedulers", [])))
        load_checkpoint(info.path, self.model, optimizers=self.optimizers)
        load_schedulers()  # after the optimizers, whose rates they go on from
        before, now = saved.get("steps_per_epoch", self.steps_per_epoch), self.steps_per_epoch
        # With other ranks or batch sizes as many steps would be another part of the data.
        self.step = info.step * now // before
        if ranks.rank == 0 and before != now:
            logger.warning(
                "%s: an epoch had %d steps, and has %d: step %d is step %d now",
                info.path, before, now, info.step, self.step,
            )  # fmt: skip
