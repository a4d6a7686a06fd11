"""How far a job is: its steps are counted, and it clusters and saves after those that ask for it.

Of a loop of training nothing else is needed: which batch comes next follows from the steps.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from cce_torchrec.checkpoint.folder import latest_checkpoint
from cce_torchrec.checkpoint.load import load_checkpoint
from cce_torchrec.checkpoint.optimizers import listed
from cce_torchrec.checkpoint.save import save_checkpoint
from cce_torchrec.checkpoint.saved_progress import NOTHING_SAVED, SavedProgress, saved_extra
from cce_torchrec.checkpoint.schedulers import loader
from cce_torchrec.clustering.ahead import check_ahead, has_helpers, optimizer_of_tables
from cce_torchrec.clustering.collections import cce_collections
from cce_torchrec.clustering.finalizing import finalize
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
            that differ between ranks, no checkpoint where there are no epochs, training in a folder
            that is one, or schedulers other than those in the checkpoint; options with which a
            clustering could only fail, no CCE table to cluster, an optimizer that lacks tables; and
            what `load_checkpoint` and `save_checkpoint` raise.
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
    """By default `ClusteringSchedule.for_tables`, of which the last clustering finalizes."""
    clustering: Mapping[str, Any] = field(default_factory=dict, kw_only=True)
    """Options of `cluster`, by name; `optimizer` is by default that which has unsharded and
    data-parallel tables."""
    step: int = field(default=0, init=False)
    """Steps so far."""

    def __post_init__(self) -> None:
        ranks = Ranks(None)
        what = "epochs, save_every, schedule, schedulers"
        same_task(lambda: (None, self._settings()), what, ranks.group)
        # Every step is collective, so that no rank takes more than the one with the fewest.
        self.steps_per_epoch = min(ranks.agree(lambda: self.steps_per_epoch))
        default = ClusteringSchedule.never()
        if self.epochs:
            configs = [
                config
                for _, collection in cce_collections(self.model)
                for config in collection.embedding_bag_configs()
            ]
            default = ClusteringSchedule.for_tables(
                configs, self.epochs, self.steps_per_epoch, finalize=True
            )
        self._when = self.schedule or default
        self._is_late = False
        # Now, as what cannot be saved would else be found when hours of training are to be.
        ranks.agree(self._extra)
        # Without an epoch to train there has to be one, or an untrained model would be evaluated.
        resumes = (
            self.epochs == 0 or ranks.first(lambda: latest_checkpoint(self.folder)) is not None
        )
        saved = ranks.first(lambda: SavedProgress.latest(self.folder)) if resumes else NOTHING_SAVED
        self.step = saved.step_now(self.steps_per_epoch)
        if self.epochs and self._when != ClusteringSchedule.never():
            same_task(lambda: (None, self._clustering_ahead()), "clustering", ranks.group)
        if resumes:
            self._resume(saved, ranks)

    def _settings(self) -> Hashable:
        """What ranks have to give alike, as numbers of Python's and lists that may be read twice.

        Raises:
            ValueError: something is of no use, saying what to give.
        """
        for name, least in (("epochs", 0), ("steps_per_epoch", 1), ("save_every", 1)):
            setattr(self, name, _whole(name, getattr(self, name), least))
        self.optimizers = listed(self.optimizers, "optimizers", "param_groups")
        self.schedulers = listed(self.schedulers, "schedulers", "load_state_dict")
        if not isinstance(self.schedule, ClusteringSchedule | None):
            raise ValueError(
                f"schedule {self.schedule!r} is no ClusteringSchedule; give one of its forms, such "
                "as ClusteringSchedule.every(1000)"
            )
        if not isinstance(self.clustering, Mapping):
            raise ValueError(
                f"clustering {self.clustering!r} is no dictionary of options of cluster, by name"
            )
        kinds = tuple(type(scheduler).__name__ for scheduler in self.schedulers)
        return self.epochs, self.save_every, self.schedule, kinds

    def _clustering_ahead(self) -> Hashable:
        """Completes and checks the options of the clusterings that are still to come."""
        # Unsharded and data-parallel tables need it.
        if "optimizer" not in self.clustering:
            optimizer = optimizer_of_tables(self.model, self.optimizers)
            self.clustering = {"optimizer": optimizer, **self.clustering}
        if self._is_past_final:  # its tables may be configured as finalized ones
            return None
        try:
            return check_ahead(self.model, self.clustering, finalize=self._when.final > 0)
        except ValueError as error:
            raise ValueError(
                f"{error}. A clustering of this job would end so: change clustering=, or give "
                "schedule=ClusteringSchedule.never()"
            ) from error

    @property
    def _is_past_final(self) -> bool:
        return 0 < self._when.final <= self.step

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
        # After a step, as of the checkpoint itself nothing may be changed by a load.
        if self._is_late:
            finalize(self.model, **self.clustering)
            self._is_late = False
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
        return saved_extra(self.epochs, self.steps_per_epoch, self.schedulers)

    def _resume(self, saved: SavedProgress, ranks: Ranks) -> None:
        """Takes over the latest checkpoint."""
        # Checked before the load, which writes into the model.
        load_schedulers = ranks.each(lambda: loader(self.schedulers, saved.schedulers))
        load_checkpoint(saved.path, self.model, optimizers=self.optimizers)
        load_schedulers()  # after the optimizers, whose rates they go on from
        # The schedule of the job that saved it may have had another end, or none.
        self._is_late = bool(self.epochs) and self._is_past_final and any(
            ranks.agree(lambda: has_helpers(self.model, self.clustering))
        )  # fmt: skip
        if ranks.rank == 0:
            saved.tell_of_changes(self.epochs, self.steps_per_epoch, self.schedulers)
        if self._is_late and ranks.rank == 0:
            logger.warning(
                "%s: the schedule finalizes after step %d, and the job goes on from step %d with "
                "tables that have helpers: they are finalized after its next step; where none is "
                "left to train, finalize(model) does it",
                saved.path, self._when.final, self.step,
            )  # fmt: skip


def _whole(name: str, value: Any, least: int) -> int:
    """`value` as a number of Python's, which NumPy's and tensors' are not.

    Raises:
        ValueError: it is no whole number from `least` on.
    """
    # Of a float the epochs would be floats too, and JSON holds no NumPy.
    try:
        found = int(operator.index(value))
    except TypeError as error:
        raise ValueError(f"{name} {value!r} is no whole number; convert it by int()") from error
    if found < least:
        raise ValueError(f"{name} {found} is below {least}, of which nothing could be trained")
    return found
