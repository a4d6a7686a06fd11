"""Which ranks cluster which chunks, and in what memory: agreed on before anything is computed."""

from __future__ import annotations

from cce_torchrec.clustering.budget import budget
from cce_torchrec.clustering.chunk_state import ChunkState
from cce_torchrec.clustering.options import Options
from cce_torchrec.clustering.task import ChunkKey, Task
from cce_torchrec.packing import CodePacking

SHARE_FROM = 1 << 27
"""Scores per pass over the pairs from which ranks share a chunk: below, the network costs more."""
DEFAULT_MEMORY_LIMIT = 1 << 30


def task_of(path: str, state: ChunkState, options: Options) -> Task:
    """How a chunk is clustered: the same wherever it lives and whatever else its rank owns."""
    config, shape, clusters = state.codes.config, state.shape, state.num_clusters
    old, new = config.packing, CodePacking.of_rows(clusters)
    limit = options.memory_limit
    if limit is None:
        limit = max(DEFAULT_MEMORY_LIMIT, old.nbytes(shape.num_ids, 1) // 10)
    plan = budget(
        shape,
        limit,
        samples_per_centroid=options.samples_per_centroid,
        engine=options.engine(state.weight.device),
        finalize=options.finalize,
    )
    wider = new.nbytes(shape.num_ids, 1) if new != old else 0
    return Task(
        path=path,
        table=config.name,
        chunk=state.chunk,
        shape=shape,
        seed=config.seed,
        num_clusterings=state.codes.num_clusterings,
        num_clusters=clusters,
        budget=plan,
        update_bytes=4 * state.weight.numel()
        + 4 * clusters * shape.dim
        + wider
        + sum(value.nbytes for value in state.optimizer_state.values()),
        row_wise=state.row_wise,
    )


class Plan:
    """Every rank's tasks: who owns them, and which are scored by all ranks.

    Chunks that one rank alone owns and that are large are scored by all, in one order; the
    others by their owners, side by side. `row_wise` are the ROW_WISE chunks of whose ids this rank
    has some: it takes part in those, in one order too.
    """

    def __init__(self, by_rank: list[list[Task]], rank: int, row_wise: set[ChunkKey]) -> None:
        self.tasks = {task.key: task for tasks in by_rank for task in tasks}
        owners: dict[ChunkKey, list[int]] = {}
        for owner, tasks in enumerate(by_rank):
            for task in tasks:
                owners.setdefault(task.key, []).append(owner)
        self.owner = {key: ranks[0] for key, ranks in owners.items()}
        # Copies (data-parallel, 2D) are clustered by each of their ranks, which needs no network.
        self.common = [
            key
            for key in sorted(self.tasks)
            if len(by_rank) > 1
            and self.tasks[key].scores >= SHARE_FROM
            and len(owners[key]) == 1
            and not self.tasks[key].row_wise
        ]
        self.row_wise = sorted(row_wise)
        self._mine = sorted({task.key for task in by_rank[rank]} | row_wise)
        self.alone = sorted(set(self._mine) - set(self.common) - row_wise)

    def memory(self, limit: int) -> tuple[int, list[ChunkKey]]:
        """Most bytes beside the model on this rank, and its chunks whose new codes may wait.

        New codes wait as far as `limit` allows; those of the other chunks are found once more
        when they are written.
        """
        taking_part = {*self._mine, *self.common}
        peak = max((self.tasks[key].budget.working_bytes for key in taking_part), default=0)
        peak += sum(self.tasks[key].update_bytes for key in self._mine)
        kept = []
        for key in self._mine:
            codes = self.tasks[key].budget.code_bytes
            if peak + codes <= limit:
                peak += codes
                kept.append(key)
        return peak, kept
