"""What a script has to know of a checkpoint before it builds a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cce_torchrec.checkpoint.folder import find, read_manifest
from cce_torchrec.checkpoint.location import location
from cce_torchrec.checkpoint.manifest import CCETableRecord, TableRecord
from cce_torchrec.clustering.schedule import ClusteringSchedule


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """What a checkpoint says of itself, read by `checkpoint_info`."""

    path: Path
    """Of the checkpoint itself, `folder/step-...`."""
    step: int
    """Optimizer steps so far."""
    extra: dict[str, Any] | None
    """What `save_checkpoint` was given."""
    schedule: ClusteringSchedule | None
    tables: dict[str, TableRecord]
    """By `collection.table`: ids and dimension, of CCE tables also chunks, rows and seed."""
    finalized: list[str]
    """CCE tables with learned codes that have no helper rows, by their names in `tables`."""
    world_size: int
    """Ranks that saved it."""
    format: int
    versions: dict[str, Any]
    """Of torch, FBGEMM and TorchRec when it was saved."""


def checkpoint_info(folder: str | Path) -> CheckpointInfo:
    """What the checkpoint that `load_checkpoint(folder, ...)` would load says of itself.

    Reads one small file and needs no model. It is no collective call: ranks that build a model by
    it should all see the same checkpoint, so call it while none is saved.

    Args:
        folder: of the job, whose latest checkpoint is meant, or of one checkpoint; a local path or
            the URI of an object store.

    Raises:
        ValueError: there is no checkpoint, or its manifest is damaged or of another format.
    """
    path = find(location(folder))
    found = read_manifest(path)
    return CheckpointInfo(
        path=path,
        step=found.step,
        extra=found.extra,
        schedule=found.schedule,
        tables=found.tables,
        finalized=sorted(name for name, table in found.tables.items() if is_final(table)),
        world_size=found.world_size,
        format=found.format,
        versions=found.versions,
    )


def is_final(table: TableRecord) -> bool:
    """Whether it is a CCE table with learned codes that has no helper rows."""
    return isinstance(table, CCETableRecord) and table.learned_codes and not table.num_helper_rows
