"""What a clustering step tells its caller."""

from __future__ import annotations

from dataclasses import dataclass, field

from cce_torchrec.clustering.chunk_state import ChunkState
from cce_torchrec.clustering.chunk_update import ChunkUpdate
from cce_torchrec.clustering.task import ChunkKey


@dataclass(frozen=True, kw_only=True)
class ChunkReport:
    """What the clustering step did to one chunk."""

    table: str
    """Path of the table's collection in the model, and the table's name."""
    chunk: int
    ids: int
    objective_before: float
    """Sum of the squared distance between embedding and main row, over the ids (weighted) that
    K-means saw."""
    objective_after: float
    """The same with the new codes and the new main rows."""
    changed: float
    """Share of ids whose code is another one."""
    empty_clusters: int
    seconds: float


@dataclass(frozen=True)
class ClusteringReport:
    """What the clustering step did; the same on every rank, seconds apart."""

    chunks: list[ChunkReport] = field(default_factory=list)
    seconds: float = 0.0
    peak_bytes: int = 0
    """Most bytes beside the model on this rank, as computed before the step."""
    left_alone: dict[str, str] = field(default_factory=dict)
    """Why each CCE table that was not clustered was not, by its path: frozen ones, for one."""


def report_of(key: ChunkKey, state: ChunkState, update: ChunkUpdate, seconds: float) -> ChunkReport:
    """The report of one chunk that this rank owns."""
    return ChunkReport(
        table=key[0],
        chunk=key[1],
        ids=state.codes.config.num_embeddings,
        objective_before=update.objective_before,
        objective_after=update.objective_after,
        changed=update.changed / state.codes.config.num_embeddings,
        empty_clusters=update.empty_clusters,
        seconds=seconds,
    )
