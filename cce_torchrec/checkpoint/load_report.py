"""What a load tells its caller."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cce_torchrec.clustering.schedule import ClusteringSchedule
from cce_torchrec.collectives import reason


@dataclass(frozen=True)
class LoadReport:
    """What `load_checkpoint` took over; the same on every rank.

    Tables are named as `collection.table`, all other state as in the state dict.
    """

    path: Path
    step: int
    schedule: ClusteringSchedule | None
    extra: dict[str, Any] | None
    world_size: int
    """Ranks that saved it."""
    tables: list[str]
    """Tables that were loaded, as `collection.table`."""
    dropped: list[str]
    """What the checkpoint has and could not be carried over, or the model has and did not get."""
    learning_rates: str
    """Whose learning rates the model has now, "checkpoint" or "model"; see `load_checkpoint`."""
    finalized: list[str] = field(default_factory=list)
    """Tables that became finalized, as they are so in the checkpoint and were not in the model."""
    loaded: list[str] = field(default_factory=list)
    """All that was loaded: tables, and the parameters and buffers of the rest of the model."""
    grown: list[str] = field(default_factory=list)
    """Tables of `loaded` that have more ids in the model."""
    new: list[str] = field(default_factory=list)
    """What the model has and the checkpoint lacks, which stays as it was; by `strict=False`."""
    missing: list[str] = field(default_factory=list)
    """What the checkpoint has and the model lacks; by `strict=False`."""
    conflicts: dict[str, str] = field(default_factory=dict)
    """What both have and differs, which stays as it was: its name, and how; by `strict=False`."""


def in_part(path: Path, error: BaseException) -> ValueError:
    """What to raise where `error` came when something was written into the model already."""
    return ValueError(
        f"{path}: reading failed ({reason(error)}); the model may be overwritten in part: load "
        "again before it goes on"
    )
