"""One chunk's clustering, wherever its codebook and its codes are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch

from cce_torchrec.clustering.budget import assign_block
from cce_torchrec.clustering.chunk_group import ALONE, ChunkGroup
from cce_torchrec.clustering.chunk_state import ChunkState
from cce_torchrec.clustering.chunk_update import ChunkUpdate, Relabelling, new_main_rows
from cce_torchrec.clustering.id_passes import NewCodes
from cce_torchrec.clustering.options import Options
from cce_torchrec.clustering.pair_batch import PairBatch, codebooks_only, of_all_ids
from cce_torchrec.clustering.pairs import ChunkPairs, find_pairs
from cce_torchrec.clustering.scoring import Scoring
from cce_torchrec.clustering.task import Task
from cce_torchrec.spans import span

Parts = Iterable[NewCodes]
"""New codes, found as they are asked for."""


class ChunkSolver:
    """The steps of one chunk's clustering, the same for each of three placements.

    - Alone: the owner of the chunk has codebook and codes and does everything.
    - Shared: it has both, and the other ranks score their share of what it sends (ScoringHelper).
    - ROW_WISE: codes are spread over ranks by ids. Each counts the pairs of its ids and finds
      their new codes, and all score.

    Collective: every rank of `scorers` calls each step, and where one fails, it raises on all.
    Pairs, counts and integer sums cross the network, codes do not. Results are the same bytes
    wherever the chunk is and however many ranks there are.

    Args:
        state: the chunk on this rank.
        task: what all ranks know of it.
        options: of the step.
        scorers: the ranks that find nearest centroids; for a ROW_WISE chunk those that hold it.
    """

    def __init__(
        self, state: ChunkState, task: Task, options: Options, scorers: ChunkGroup
    ) -> None:
        self._state, self._task, self._options, self._scorers = state, task, options, scorers
        self._scoring = Scoring(task, options, scorers.device)

    def solve(self, keep_codes: bool) -> ChunkUpdate:
        """What the step will write; with the new codes of this rank's ids if `keep_codes`.

        Raises:
            ValueError: on every rank, if any fails.
        """
        pairs = self._pairs()
        result = self._scoring.kmeans(pairs.points, self._scorers)
        state = self._state.optimizer_state
        update = self._scorers.together(
            lambda: new_main_rows(self._task, state, pairs.points, result)
        )
        if keep_codes:
            # K-means ends with an assignment to its final centroids: nothing is scored again.
            nearest = result.assignment if self._task.sees_all_ids else None
            with span(f"{self._task.span}, codes"):
                self._relabel(pairs, update, nearest, update.codes.append)
        return update

    def write_codes(self, update: ChunkUpdate) -> None:
        """Finds new codes that were not kept, and writes them part by part."""
        if self._task.sees_all_ids:
            # Codes of this chunk are still the old ones: the same pairs as when it was solved.
            pairs = self._pairs()
            self._send_scored(update)
            nearest = self._scoring.nearest(pairs.points, update.scored, self._scorers)
            self._relabel(pairs, update, nearest, NewCodes.write)
        else:
            pairs = self._found(lambda: codebooks_only(self._state))
            self._send_scored(update)
            self._relabel(pairs, update, None, NewCodes.write)

    def _send_scored(self, update: ChunkUpdate) -> None:
        if not self._state.row_wise:  # otherwise every rank has an update
            self._scorers.together(_nothing)  # room for it
            self._scorers.broadcast(update.scored)

    def _pairs(self) -> ChunkPairs:
        """The pairs that K-means sees, on every rank."""
        state, options, budget = self._state, self._options, self._task.budget

        def find() -> ChunkPairs:
            weights = state.holders.together(lambda: options.weights_of(state))
            return find_pairs(state, budget, weights)

        with span(f"{self._task.span}, pairs"):
            return self._found(find)

    def _found(self, find: Callable[[], ChunkPairs]) -> ChunkPairs:
        # ROW_WISE: a call of all scorers itself, which leaves the same points on each.
        return find() if self._state.row_wise else self._scorers.send(find)

    def _relabel(
        self,
        pairs: ChunkPairs,
        update: ChunkUpdate,
        nearest: torch.Tensor | None,
        put: Callable[[NewCodes], object],
    ) -> None:
        """Finds new codes, takes them into account in `update`, and hands them to `put`.

        Args:
            nearest: of all pairs, or None where K-means saw a sample of them.
        """
        state, scorers = self._state, self._scorers
        relabelling = scorers.together(lambda: Relabelling(self._task, pairs.points, update))
        # How many ids have each pair is known, unless they are in a list and weigh otherwise.
        counted = nearest is not None and (pairs.by_pair or self._options.weights is None)

        def take(parts: Parts) -> None:
            if counted and nearest is not None and state.owned:
                relabelling.moves.add_points(pairs.points, nearest, pairs.numbers)
            for part in parts:
                # Before it is written: residuals and moves are of the old codes.
                relabelling.take(part, counted)
                put(part)

        if nearest is not None:
            parts: Parts = of_all_ids(state.ids, pairs, nearest)
        elif state.row_wise or scorers.group is None:
            parts = self._own_blocks(pairs, update)
        else:
            parts = self._shared_blocks(pairs, update, take)
        scorers.together(lambda: take(parts))
        if state.row_wise:
            scorers.all_reduce(relabelling.totals)
            relabelling.moves.share(scorers)
        scorers.together(relabelling.finish)

    def _own_blocks(self, pairs: ChunkPairs, update: ChunkUpdate) -> Iterator[NewCodes]:
        """Of this rank's ids, scored by this rank alone, block by block."""
        ids = self._state.ids
        for first in ids.local[:: assign_block(ids.codes.device, self._task.shape.dim)]:
            batch = PairBatch.from_block(ids, pairs.points, first)
            yield batch.new_codes(self._scoring.nearest(batch.points, update.scored, ALONE))

    def _shared_blocks(
        self, pairs: ChunkPairs, update: ChunkUpdate, take: Callable[[Parts], None]
    ) -> Parts:
        """Of all ids, scored by all ranks, block by block; all but the last block's are taken."""
        ids, scorers = self._state.ids, self._scorers
        scored: list[tuple[PairBatch, torch.Tensor]] = []

        def new_codes() -> Iterator[NewCodes]:
            while scored:  # taken out, so that the next block has the memory of this one
                batch, nearest = scored.pop()
                yield batch.new_codes(nearest)

        def next_block(first: int) -> PairBatch:
            # Where the others wait for the next block, they can be told of a failure in both.
            take(new_codes())
            return PairBatch.from_block(ids, pairs.points, first)

        def score(first: int) -> None:
            batch = scorers.send(lambda: next_block(first))
            nearest = self._scoring.nearest(batch.points, update.scored, scorers)
            scored.append((batch, nearest))

        for first in self._task.id_blocks(scorers.device):
            score(first)
        return new_codes()


class ScoringHelper:
    """The other side of a shared chunk's ChunkSolver: a rank that scores, and has nothing of it.

    Its calls are those of the owner, one by one, with nothing of its own to fail in.
    """

    def __init__(self, task: Task, options: Options, scorers: ChunkGroup) -> None:
        self._task, self._scorers = task, scorers
        self._scoring = Scoring(task, options, scorers.device)

    def solve(self, keep_codes: bool) -> None:
        """Helps to solve; nothing of it stays here.

        Raises:
            ValueError: on every rank, if any fails.
        """
        points = self._scorers.receive(self._task.shape)
        result = self._scoring.kmeans(points, self._scorers)
        self._scorers.together(_nothing)  # new main rows
        if keep_codes:
            self._relabel(result.scored)

    def write_codes(self) -> None:
        """Helps to find new codes that were not kept."""
        points = self._scorers.receive(self._task.shape)
        shape, device = (self._task.num_clusters, self._task.shape.dim), self._scorers.device
        room = partial(torch.empty, shape, dtype=torch.float32, device=device)
        scored = self._scorers.together(room)
        self._scorers.broadcast(scored)
        if self._task.sees_all_ids:
            self._scoring.nearest(points, scored, self._scorers)
        self._relabel(scored)

    def _relabel(self, scored: torch.Tensor) -> None:
        self._scorers.together(_nothing)  # room for sums of residuals
        if not self._task.sees_all_ids:
            for _ in self._task.id_blocks(self._scorers.device):
                points = self._scorers.receive(self._task.shape)
                self._scoring.nearest(points, scored, self._scorers)
        self._scorers.together(_nothing)  # the codes that were found last
        self._scorers.together(_nothing)  # new helper rows


def _nothing() -> None:
    """What a helper does while the owner works by itself."""
