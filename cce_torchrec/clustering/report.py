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
    """`collection.table`, as in checkpoints: the path in the model inside its wrappers."""
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

    def __str__(self) -> str:
        """The report in a line, as the log has it."""
        parts = [
            f"{len({chunk.table for chunk in self.chunks})} tables, {len(self.chunks)} chunks in "
            f"{self.seconds:.2f} s"
        ]
        if self.chunks:
            before = sum(chunk.objective_before for chunk in self.chunks)
            after = sum(chunk.objective_after for chunk in self.chunks)
            changed = sum(chunk.changed * chunk.ids for chunk in self.chunks)
            parts += [
                f"objective {before:.6g} before, {after:.6g} after",
                f"{changed / sum(chunk.ids for chunk in self.chunks):.1%} of codes changed",
                f"{sum(chunk.empty_clusters for chunk in self.chunks)} empty clusters",
            ]
        return ", ".join([*parts, f"{len(self.left_alone)} tables left alone"])


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
