"""Which ranks cluster which chunks, and in what memory: agreed on before anything is computed."""

from __future__ import annotations

from dataclasses import dataclass

from cce_torchrec.clustering.budget import Budget, ChunkShape, budget
from cce_torchrec.clustering.chunk import ChunkState
from cce_torchrec.clustering.options import Options
from cce_torchrec.config import code_dtype

SHARE_FROM = 1 << 27
"""Scores per pass over the pairs from which ranks share a chunk: below, the network costs more."""
DEFAULT_MEMORY_LIMIT = 1 << 30
Key = tuple[str, int]


@dataclass(frozen=True, kw_only=True)
class Task:
    """A chunk to be clustered, as every rank hears of it."""

    path: str
    table: str
    chunk: int
    num_ids: int
    num_rows: int
    num_helper_rows: int
    dim: int
    num_clusters: int
    budget: Budget
    book_bytes: int
    """New codebook and optimizer state, which wait until all chunks commit, and codes that
    become wider."""
    row_wise: bool = False
    """Whether its codes are spread over ranks by ids."""

    @property
    def key(self) -> Key:
        """Identifies the chunk in the model."""
        return self.path, self.chunk

    @property
    def who(self) -> str:
        """Table and chunk, for messages."""
        return f"table {self.table!r}, chunk {self.chunk}"

    @property
    def shared(self) -> bool:
        """Whether ranks share its scoring, if they do not all own it."""
        pairs = min(self.num_ids, self.num_rows * self.num_helper_rows)
        return self.num_clusters * pairs >= SHARE_FROM


def task_of(path: str, state: ChunkState, options: Options) -> Task:
    """How a chunk is clustered: the same wherever it lives and whatever else its rank owns."""
    config = state.codes.config
    limit = options.memory_limit
    if limit is None:
        codes = config.num_embeddings * code_dtype(config.num_rows).itemsize
        limit = max(DEFAULT_MEMORY_LIMIT, codes // 10)
    engine, clusters = options.engine(state.weight.device), state.num_clusters
    shape = ChunkShape(
        num_ids=config.num_embeddings,
        num_rows=config.num_rows,
        helper_rows=config.helper_rows,
        dim=config.chunk_dim,
    )
    plan = budget(
        shape,
        limit,
        samples_per_centroid=options.samples_per_centroid,
        engine=engine,
        finalize=options.finalize,
    )
    waiting = 4 * state.weight.numel() + 4 * clusters * config.chunk_dim
    if code_dtype(clusters) != code_dtype(config.num_rows):
        waiting += config.num_embeddings * code_dtype(clusters).itemsize
    waiting += sum(v.numel() * v.element_size() for v in state.optimizer_state.values())
    return Task(
        path=path,
        table=config.name,
        chunk=state.chunk,
        num_ids=config.num_embeddings,
        num_rows=config.num_rows,
        num_helper_rows=config.helper_rows,
        dim=config.chunk_dim,
        num_clusters=clusters,
        budget=plan,
        book_bytes=waiting,
        row_wise=state.blocks is not None,
    )


class Plan:
    """Every rank's tasks: who owns them, and which are scored by all ranks.

    Chunks that one rank alone owns and that are large are scored by all, in one order; the
    others by their owners, side by side. `held` are the ROW_WISE chunks of whose ids this rank
    has a block: it takes part in those, in one order too.
    """

    def __init__(self, by_rank: list[list[Task]], rank: int, held: set[Key]) -> None:
        self.tasks = {task.key: task for theirs in by_rank for task in theirs}
        owners: dict[Key, list[int]] = {}
        for owner, theirs in enumerate(by_rank):
            for task in theirs:
                owners.setdefault(task.key, []).append(owner)
        self.owner = {key: ranks[0] for key, ranks in owners.items()}
        self.common = [
            key
            for key in sorted(self.tasks)
            if len(by_rank) > 1
            and self.tasks[key].shared
            and len(owners[key]) == 1
            and not self.tasks[key].row_wise
        ]
        self.row_wise = sorted(held)
        self._mine = sorted({task.key for task in by_rank[rank]} | held)
        self.alone = sorted(set(self._mine) - set(self.common) - held)

    def memory(self, limit: int) -> tuple[int, list[Key]]:
        """Most bytes beside the model on this rank, and its chunks whose new codes may wait.

        New codes wait as far as `limit` allows; those of the other chunks are found once more
        when they are written.
        """
        taking_part = {*self._mine, *self.common}
        peak = max((self.tasks[key].budget.working_bytes for key in taking_part), default=0)
        peak += sum(self.tasks[key].book_bytes for key in self._mine)
        kept = []
        for key in self._mine:
            codes = self.tasks[key].budget.code_bytes
            if peak + codes <= limit:
                peak += codes
                kept.append(key)
        return peak, kept
