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
    moved: float
    """The same where renumbering does not count: share of ids that are not in the cluster that
    theirs has become (see `clustering/moves.py`)."""
    empty_clusters: int
    """Clusters that K-means left without ids (weighted)."""
    dead_rows: int
    """Main and helper rows that no id reads after the step."""
    imbalance: float
    """k * sum(c^2) / N^2 of the ids c of each of k clusters: 1 where all have equally many, k where
    one has all (FAISS's imbalance factor)."""
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

    @property
    def objective_before(self) -> float:
        """Sum over all chunks."""
        return sum(chunk.objective_before for chunk in self.chunks)

    @property
    def objective_after(self) -> float:
        """Sum over all chunks."""
        return sum(chunk.objective_after for chunk in self.chunks)

    @property
    def changed(self) -> float:
        """Share of all codes that are others; 0 of no chunk."""
        return self._mean("changed")

    @property
    def moved(self) -> float:
        """Share of all codes that changed beyond renumbering; 0 of no chunk."""
        return self._mean("moved")

    @property
    def empty_clusters(self) -> int:
        """Of all chunks."""
        return sum(chunk.empty_clusters for chunk in self.chunks)

    @property
    def dead_rows(self) -> int:
        """Of all chunks."""
        return sum(chunk.dead_rows for chunk in self.chunks)

    @property
    def imbalance(self) -> float:
        """Mean over chunks, weighted by ids; 0 of no chunk."""
        return self._mean("imbalance")

    def _mean(self, name: str) -> float:
        """Over all codes: chunks count by their ids."""
        ids = sum(chunk.ids for chunk in self.chunks)
        return sum(getattr(chunk, name) * chunk.ids for chunk in self.chunks) / max(ids, 1)

    def __str__(self) -> str:
        """The report in a line, as the log has it."""
        parts = [
            f"{len({chunk.table for chunk in self.chunks})} tables, {len(self.chunks)} chunks in "
            f"{self.seconds:.2f} s"
        ]
        if self.chunks:
            parts += [
                f"objective {self.objective_before:.6g} before, {self.objective_after:.6g} after",
                f"{self.changed:.1%} of codes changed, {self.moved:.1%} beyond renumbering",
                f"{self.empty_clusters} empty clusters",
                f"{self.dead_rows} dead rows, imbalance {self.imbalance:.3g}",
            ]
        return ", ".join([*parts, f"{len(self.left_alone)} tables left alone"])


def report_of(key: ChunkKey, state: ChunkState, update: ChunkUpdate, seconds: float) -> ChunkReport:
    """The report of one chunk that this rank owns."""
    ids = state.codes.config.num_embeddings
    return ChunkReport(
        table=key[0],
        chunk=key[1],
        ids=ids,
        objective_before=update.objective_before,
        objective_after=update.objective_after,
        changed=update.changed / ids,
        moved=update.moved,
        empty_clusters=update.empty_clusters,
        dead_rows=update.dead_rows,
        imbalance=update.imbalance,
        seconds=seconds,
    )
