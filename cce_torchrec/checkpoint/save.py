"""Saving a checkpoint: collective, and whole or not there."""

from __future__ import annotations

import json
import logging
import operator
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, overload

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn

from cce_torchrec.checkpoint import folder as folders
from cce_torchrec.checkpoint.finite import refuse_not_finite
from cce_torchrec.checkpoint.location import location, write_whole
from cce_torchrec.checkpoint.manifest import Fingerprint, Manifest, OptimizerRecord, TableRecord
from cce_torchrec.checkpoint.optimizers import ParameterState, optimizer_states
from cce_torchrec.checkpoint.pending import PendingCheckpoint, finish_pending
from cce_torchrec.checkpoint.plain import plain_extra
from cce_torchrec.checkpoint.random_state import random_state
from cce_torchrec.checkpoint.tables import describe_tables
from cce_torchrec.checkpoint.tensor_files import SavePlans, TensorWriter
from cce_torchrec.clustering.replicas import share_notes
from cce_torchrec.clustering.schedule import ClusteringSchedule
from cce_torchrec.collectives import Ranks, same_task
from cce_torchrec.spans import span
from cce_torchrec.versions import installed_versions

logger = logging.getLogger(__name__)


@overload
def save_checkpoint(
    folder: str | Path, model: nn.Module, *, step: int,
    optimizers: Sequence[torch.optim.Optimizer] = ..., schedule: ClusteringSchedule | None = ...,
    extra: dict[str, Any] | None = ..., keep: int = ..., pin: str = ..., check_finite: bool = ...,
    blocking: Literal[True] = ..., process_group: dist.ProcessGroup | None = ...,
) -> Path: ...  # fmt: skip


@overload
def save_checkpoint(
    folder: str | Path, model: nn.Module, *, step: int,
    optimizers: Sequence[torch.optim.Optimizer] = ..., schedule: ClusteringSchedule | None = ...,
    extra: dict[str, Any] | None = ..., keep: int = ..., pin: str = ..., check_finite: bool = ...,
    blocking: Literal[False], process_group: dist.ProcessGroup | None = ...,
) -> PendingCheckpoint: ...  # fmt: skip


def save_checkpoint(
    folder: str | Path,
    model: nn.Module,
    *,
    step: int,
    optimizers: Sequence[torch.optim.Optimizer] = (),
    schedule: ClusteringSchedule | None = None,
    extra: dict[str, Any] | None = None,
    keep: int = 2,
    pin: str = "",
    check_finite: bool = True,
    blocking: bool = True,
    process_group: dist.ProcessGroup | None = None,
) -> Path | PendingCheckpoint:
    """Saves a training job and returns the checkpoint's own folder, `folder/step-...`.

    A collective call. Saved are the model with the codes, hash seeds and numbers of clusterings of
    its tables, all optimizer state (fused state needs no mention in `optimizers`), and each
    rank's random state. torch.distributed.checkpoint plans who writes what; the files are JSON and
    safetensors. A kill at any moment leaves the previous checkpoint the latest and loadable.

    Args:
        folder: shared by all ranks; holds the checkpoints of one job. A local path, or the URI of
            an object store (`s3://bucket/run`), whose credentials fsspec finds as it always does.
        model: unsharded, or under DistributedModelParallel.
        step: optimizer steps so far.
        optimizers: those that the user steps.
        schedule: when the job clusters.
        extra: whatever else a restart needs (data position, metrics): JSON, whose keys are text and
            whose tuples come back as lists; taken from rank 0.
        keep: checkpoints that stay in `folder`, at least 1; older ones are removed once this
            one is in place.
        pin: a name such as "best", under which this checkpoint stays beside those, until another is
            saved under the same name.
        check_finite: refuse parameters and optimizer state with NaN or infinite values, so that a
            run that diverged does not push its last good checkpoint out.
        blocking: False copies what there is to save and returns; a thread writes it while training
            goes on, and the result is a `PendingCheckpoint`. What failed is raised by its
            `result()`, or by the next save or load.
        process_group: the ranks that share the tables; by default all.

    Raises:
        ValueError: on every rank, if anything failed on any; the folder's latest checkpoint is
            then what it was.
    """
    began = time.perf_counter()
    ranks = Ranks(process_group)

    def asked() -> tuple[_Target, tuple[int | str, ...]]:
        finish_pending()  # here, as what failed on one rank has to be raised on all
        target = _Target(location(folder), _checked_step(step), keep, pin)
        return target, (target.step, keep, pin, check_finite, blocking)

    target = same_task(asked, "step, keep, pin, check_finite, blocking", ranks.group)
    writer = TensorWriter(ranks.rank, copy=not blocking)
    with span("checkpoint save, take"):
        tables, optimizer_records = _take(ranks, writer, model, optimizers, check_finite)
    manifest = Manifest(
        step=target.step,
        world_size=ranks.size,
        tables=tables,
        optimizers=optimizer_records,
        schedule=schedule,
        extra=ranks.first(lambda: plain_extra(extra)),
        versions=installed_versions(),
        files={},
    )
    job = _Job(target, manifest, writer, random_state(), began)
    return job.write(ranks) if blocking else PendingCheckpoint(job.write, ranks)


@dataclass(frozen=True)
class _Target:
    """Where a checkpoint goes, and what stays beside it."""

    folder: Path
    step: int
    keep: int
    pin: str

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise ValueError(
                f"keep {self.keep} would remove the checkpoint just written; use at least 1"
            )
        if not (isinstance(self.pin, str) and re.fullmatch(r"\w*", self.pin)):
            raise ValueError(
                f"pin {self.pin!r} is part of a folder's name; use letters, digits and _"
            )


@dataclass(frozen=True)
class _Job:
    """All that a checkpoint needs; nothing is written before `write`."""

    target: _Target
    manifest: Manifest
    writer: TensorWriter
    random: dict[str, Any]
    began: float
    """When the call was made, by `time.perf_counter`."""

    def write(self, ranks: Ranks) -> Path:
        """Writes this rank's files and, once all ranks have, makes them the latest checkpoint."""
        to = self.target
        checkpoint = ranks.first(lambda: folders.begin(to.folder, to.step, to.pin))
        try:
            with span("checkpoint save, write"):
                written = ranks.agree(lambda: self._write(checkpoint, ranks.rank))
            files = {name: found for part in written for name, found in part.items()}
            manifest = replace(self.manifest, files=files)
            path = ranks.first(lambda: folders.commit(checkpoint, manifest, to.keep))
            if ranks.rank == 0:
                seconds = time.perf_counter() - self.began
                logger.info("saved %s: %s in %.2f s", path, manifest.summary, seconds)
            return path
        except ValueError:
            # Every rank has stopped writing by now. The next save tries again if this fails too.
            if ranks.rank == 0:
                folders.clear([checkpoint])
            raise

    def _write(self, checkpoint: Path, rank: int) -> dict[str, Fingerprint]:
        """Writes what this rank has; fingerprints of its files, which are in place by then."""
        name = f"rank-{rank}.json"
        random = write_whole(checkpoint / name, json.dumps(self.random))
        return {name: random, **self.writer.write(checkpoint)}


def _checked_step(step: int) -> int:
    """`step` as a number of Python's, which NumPy's and tensors' are not.

    Raises:
        ValueError: it is no whole number from 0 on.
    """
    try:
        found = operator.index(step)
    except TypeError as error:
        raise ValueError(f"step {step!r} is no whole number; pass the steps so far") from error
    if found < 0:
        raise ValueError(f"step {found} is negative; pass the steps so far")
    return found


def model_state(model: nn.Module) -> dict[str, Any]:
    """The model's state dict under the names that a checkpoint has."""
    return {f"model.{key}": value for key, value in model.state_dict().items()}


def optimizer_state(states: dict[str, ParameterState]) -> dict[str, Any]:
    """Optimizer state under the names that a checkpoint has."""
    return {
        f"optimizer.{name}.{key}": value
        for name, state in states.items()
        for key, value in state.tensors.items()
    }


def _take(
    ranks: Ranks,
    writer: TensorWriter,
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    check_finite: bool,
) -> tuple[dict[str, TableRecord], dict[str, OptimizerRecord]]:
    """Gives `writer` what this rank writes, and returns what the manifest says of all ranks'."""
    share_notes(model)  # before `agree`, as it is collective itself
    state: dict[str, Any] = {}

    def collect() -> tuple[dict[str, TableRecord], dict[str, OptimizerRecord]]:
        states = optimizer_states(model, optimizers)
        state.update(model_state(model) | optimizer_state(states))
        return describe_tables(model), {name: one.record() for name, one in states.items()}

    described = ranks.agree(collect)
    tables = described[0][0]
    # Masks and the like may well be infinite.
    exempt = {f"model.{name}" for name, _ in model.named_buffers()}

    def plan() -> None:
        dcp.save(state, storage_writer=writer, planner=SavePlans(), process_group=ranks.group)
        if check_finite:
            refuse_not_finite(writer.shards, exempt, tables)

    ranks.agree(plan)
    # Each rank describes the parameters that it has; only together are they those of the job.
    return tables, {name: one for _, part in described for name, one in part.items()}
