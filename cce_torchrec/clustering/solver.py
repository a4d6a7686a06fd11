"""One chunk's clustering, wherever its codebook and its codes are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain

import torch

from cce_torchrec.clustering.budget import assign_block
from cce_torchrec.clustering.chunk_group import ALONE, ChunkGroup
from cce_torchrec.clustering.chunk_state import ChunkState
from cce_torchrec.clustering.chunk_update import ChunkUpdate, Relabelling, new_main_rows
from cce_torchrec.clustering.id_passes import ChunkIds, NewCodes
from cce_torchrec.clustering.options import Options
from cce_torchrec.clustering.pair_batch import PairBatch, codebooks_only, of_all_ids
from cce_torchrec.clustering.pairs import ChunkPairs, find_pairs
from cce_torchrec.clustering.scoring import Scoring
from cce_torchrec.clustering.task import Task
from cce_torchrec.kmeans.points import PairPoints

Put = Callable[[NewCodes], object]
"""What is done with new codes: they are kept, or written."""


class ChunkSolver:
    """The steps of one chunk's clustering, the same for each of three placements.

    - The owner has codebook and codes and does everything (`scorers` is one rank).
    - The owner has both, and every rank of `scorers` scores its share of what the owner sends.
    - Codes are spread over ranks by ids (ROW_WISE): each counts the pairs of its ids and finds
      their new codes, and all score.

    Collective: every rank of `scorers` calls each step, and where one fails, it raises on all.
    Pairs, counts and integer sums cross the network, codes do not. Results are the same bytes
    wherever the chunk is and however many ranks there are.

    Args:
        states: the chunk on this rank; empty on a rank that only scores.
        task: what all ranks know of it.
        options: of the step.
        scorers: the ranks that find nearest centroids.
    """

    def __init__(
        self, states: list[ChunkState], task: Task, options: Options, scorers: ChunkGroup
    ) -> None:
        self._states, self._task, self._options, self._scorers = states, task, options, scorers
        self._is_spread = any(state.is_spread for state in states)
        self._scoring = Scoring(task, options, scorers.device)

    def solve(self, keep_codes: bool) -> ChunkUpdate:
        """What the step will write; with the new codes of this rank's ids if `keep_codes`.

        Raises:
            ValueError: on every rank, if any fails.
        """
        pairs = self._pairs()
        result = self._scoring.kmeans(pairs.points, self._scorers.group)
        update = self._scorers.agree(
            lambda: new_main_rows(self._task, self._optimizer_state(), pairs.points, result)
        )
        if keep_codes:
            # K-means ends with an assignment to its final centroids: nothing is scored again.
            nearest = result.assignment if self._task.sees_all_ids else None
            self._relabel(pairs, update, nearest, update.codes.append)
        return update

    def write_codes(self, update: ChunkUpdate) -> None:
        """Finds new codes that were not kept, and writes them part by part."""
        if self._task.sees_all_ids:
            # Codes of this chunk are still the old ones: the same pairs as when it was solved.
            pairs = self._pairs()
            nearest = self._nearest(pairs.points, update, self._scorers)
            self._relabel(pairs, update, nearest, NewCodes.write)
        else:
            pairs = self._on_all_scorers(lambda: [codebooks_only(s) for s in self._states])
            self._relabel(pairs, update, None, NewCodes.write)

    def _optimizer_state(self) -> dict[str, torch.Tensor]:
        return {k: v for state in self._states for k, v in state.optimizer_state.items()}

    def _pairs(self) -> ChunkPairs:
        """The pairs that K-means sees, on every rank."""
        budget, weights_of = self._task.budget, self._options.weights_of
        return self._on_all_scorers(
            lambda: [find_pairs(state, budget, weights_of(state)) for state in self._states]
        )

    def _on_all_scorers(self, find: Callable[[], list[ChunkPairs]]) -> ChunkPairs:
        """What `find` gives where the chunk is; the other scorers get its points."""
        found = self._scorers.agree(find)
        if self._is_spread:
            return found[0]  # every rank has found the same
        points = self._scorers.from_owner(lambda: found[0].points, self._task.shape)
        return found[0] if found else ChunkPairs(points)

    def _nearest(
        self, points: PairPoints, update: ChunkUpdate, scorers: ChunkGroup
    ) -> torch.Tensor:
        """Nearest of the centroids that K-means scored last."""
        transformed = scorers.agree(lambda: self._scoring.in_metric_space(points))
        return self._scoring.nearest(transformed, update.scored, scorers.group)

    def _relabel(
        self, pairs: ChunkPairs, update: ChunkUpdate, nearest: torch.Tensor | None, put: Put
    ) -> None:
        """Finds new codes, takes them into account in `update`, and hands them to `put`."""
        agree = self._scorers.agree
        relabelling = agree(lambda: Relabelling(self._task, pairs.points, update))

        def take(parts: Iterable[NewCodes]) -> None:
            for part in parts:
                relabelling.take(part)  # before it is written: residuals are of the old codes
                put(part)

        for parts in self._rounds(pairs, update, nearest):
            agree(partial(take, parts))
        totals = agree(relabelling.totals)
        if self._is_spread:
            self._scorers.add_up(totals)
        agree(partial(relabelling.finish, totals))

    def _rounds(
        self, pairs: ChunkPairs, update: ChunkUpdate, nearest: torch.Tensor | None
    ) -> Iterator[Iterable[NewCodes]]:
        """New codes of this rank's ids, in as many rounds on every rank.

        What needs no other rank is done when the codes of a round are asked for, where a failure
        can be told to the others.

        Args:
            nearest: of all pairs, or None where K-means saw a sample of them.
        """
        states = self._states
        if nearest is not None:
            yield chain.from_iterable(of_all_ids(s.ids, pairs, nearest) for s in states)
        elif self._is_spread:
            yield chain.from_iterable(self._own_blocks(s.ids, pairs, update) for s in states)
        else:
            size = assign_block(self._scorers.device, self._task.shape.dim)
            for first in range(0, self._task.shape.num_ids, size):
                yield self._shared_block(first, pairs, update)

    def _own_blocks(
        self, ids: ChunkIds, pairs: ChunkPairs, update: ChunkUpdate
    ) -> Iterator[NewCodes]:
        """Of this rank's ids, scored by this rank alone, block by block."""
        for first in ids.local[:: assign_block(ids.codes.device, self._task.shape.dim)]:
            batch = PairBatch.from_block(ids, pairs.points, first)
            yield batch.new_codes(self._nearest(batch.points, update, ALONE))

    def _shared_block(
        self, first: int, pairs: ChunkPairs, update: ChunkUpdate
    ) -> Iterator[NewCodes]:
        """Of a block of the owner's ids, scored by all ranks; elsewhere nothing."""
        batches = self._scorers.agree(
            lambda: [PairBatch.from_block(s.ids, pairs.points, first) for s in self._states]
        )
        points = self._scorers.from_owner(lambda: batches[0].points, self._task.shape)
        nearest = self._nearest(points, update, self._scorers)
        return (batch.new_codes(nearest) for batch in batches)
