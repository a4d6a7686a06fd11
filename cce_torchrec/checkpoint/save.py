"""Saving a checkpoint: collective, and whole or not there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn

from cce_torchrec.checkpoint import folder as folders
from cce_torchrec.checkpoint.manifest import Fingerprint, Manifest, OptimizerRecord, TableRecord
from cce_torchrec.checkpoint.optimizers import ParameterState, optimizer_states
from cce_torchrec.checkpoint.random_state import random_state
from cce_torchrec.checkpoint.tables import describe_tables
from cce_torchrec.clustering.replicas import share_seen
from cce_torchrec.clustering.schedule import ClusteringSchedule
from cce_torchrec.collectives import Ranks
from cce_torchrec.versions import installed_versions


def save_checkpoint(
    folder: str | Path,
    model: nn.Module,
    *,
    step: int,
    optimizers: Sequence[torch.optim.Optimizer] = (),
    schedule: ClusteringSchedule | None = None,
    extra: dict[str, Any] | None = None,
    keep: int = 2,
    process_group: dist.ProcessGroup | None = None,
) -> Path:
    """Saves a training job and returns the checkpoint's own folder, `folder/step-...`.

    A collective call. Saved are the model with the codes, hash seeds and numbers of clusterings of
    its tables, all optimizer state (fused state needs no mention in `optimizers`), and each
    rank's random state, through torch.distributed.checkpoint. A kill at any moment leaves the
    previous checkpoint the latest and loadable.

    Args:
        folder: shared by all ranks; holds the checkpoints of one job.
        model: unsharded, or under DistributedModelParallel.
        step: optimizer steps so far.
        optimizers: those that the user steps.
        schedule: when the job clusters.
        extra: whatever else a restart needs (data position, metrics): JSON, taken from rank 0.
        keep: checkpoints that stay in `folder`, at least 1; older ones are removed once this
            one is in place.
        process_group: the ranks that share the tables; by default all.

    Raises:
        ValueError: on every rank, if anything failed on any; the folder's latest checkpoint is
            then what it was.
    """
    if keep < 1:
        raise ValueError(f"keep {keep} would remove the checkpoint just written; use at least 1")
    folder, ranks = Path(folder), Ranks(process_group)
    writing, name = ranks.first(lambda: folders.begin(folder, step))
    state: dict[str, Any] = {}
    share_seen(model)  # before `agree`, as it is collective itself
    described = ranks.agree(lambda: _collect(model, optimizers, state))
    written = ranks.agree(lambda: _write(writing, ranks.rank, state, process_group))
    files = {name: found for part in written for name, found in part.items()}
    # torch.distributed.checkpoint has the first rank write this file, and it is no rank's own.
    metadata = ranks.first(lambda: folders.fingerprint(writing / ".metadata"))
    manifest = Manifest(
        step=step,
        world_size=ranks.size,
        tables=described[0][0],
        # Each rank describes the parameters that it has; only together are they those of the job.
        optimizers={name: one for _, part in described for name, one in part.items()},
        schedule=schedule,
        extra=extra,
        versions=installed_versions(),
        files={".metadata": metadata, **files},
    )
    return ranks.first(lambda: folders.commit(writing, name, manifest, keep))


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


def _collect(
    model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], state: dict[str, Any]
) -> tuple[dict[str, TableRecord], dict[str, OptimizerRecord]]:
    """Fills `state` with this rank's tensors and returns what the manifest says of them."""
    states = optimizer_states(model, optimizers)
    state |= model_state(model) | optimizer_state(states)
    return describe_tables(model), {name: one.record() for name, one in states.items()}


def _write(
    writing: Path, rank: int, state: dict[str, Any], group: dist.ProcessGroup | None
) -> dict[str, Fingerprint]:
    """Writes what this rank has; fingerprints of its files, which are on disk by then."""
    dcp.save(state, storage_writer=dcp.FileSystemWriter(writing), process_group=group)
    random_file = writing / f"rank-{rank}.json"
    folders.write_durably(random_file, json.dumps(random_state()))
    files = [random_file, *writing.glob(f"__{rank}_*")]
    return {file.name: folders.fingerprint(file) for file in files}
