"""One chunk of a ROW_WISE table, whose codes are spread over ranks by ids.

Every rank counts the pairs of its ids, the owner of the codebook makes points of all pairs, all
ranks score them, and each finds the new codes of its own ids. Pairs, counts and integer sums cross
the network, codes do not. Results are the bytes of the chunk in one place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
import torch.distributed as dist

from cce_torchrec.clustering.budget import assign_block
from cce_torchrec.clustering.chunk import ChunkState, ChunkUpdate, Relabelling, new_main_rows
from cce_torchrec.clustering.id_passes import ChunkIds, IdWeights, NewCodes
from cce_torchrec.clustering.options import Options
from cce_torchrec.clustering.pairs import (
    PairBatch,
    Sampled,
    broadcast,
    codebooks_only,
    list_ids,
    most_ids,
    points_of,
    sample_hash,
    starts_wanted,
    taken_at,
)
from cce_torchrec.clustering.plan import Task
from cce_torchrec.clustering.scoring import Scoring
from cce_torchrec.codes.hashing import HashFunction
from cce_torchrec.codes.storage import pack
from cce_torchrec.collectives import gather, together
from cce_torchrec.kmeans.points import PairPoints

T = TypeVar("T")


class RowWiseSolver:
    """The steps of one chunk's clustering; collective: every rank of the table calls each.

    What a rank does by itself is followed by word from all, so that a failure is raised on every
    rank and none waits.
    """

    def __init__(
        self, state: ChunkState, task: Task, options: Options, device: torch.device
    ) -> None:
        assert state.blocks is not None
        self._state, self._task, self._options, self._device = state, task, options, device
        self._group, self._owner = state.blocks.group, state.blocks.owner
        self._source = dist.get_global_rank(self._group, self._owner)
        self._scoring = Scoring(task, options, device)

    def solve(self, keep_codes: bool) -> ChunkUpdate:
        """What the step will write, on every rank; with its new codes if `keep_codes`.

        Raises:
            ValueError: on every rank, if any fails.
        """
        points = self._points()
        result = self._scoring.kmeans(points, self._group)
        update = self._agree(lambda: new_main_rows(self._state, points, result))
        if keep_codes:
            every = self._task.budget.samples_per_centroid is None
            nearest = result.assignment if every else None
            update.codes = self._relabelled(points, update, nearest, keep=True)
        return update

    def write_codes(self, update: ChunkUpdate | None) -> None:
        """Finds the new codes that were not kept, and writes them part by part."""
        assert update is not None
        if self._task.budget.samples_per_centroid is not None:
            self._relabelled(self._books(), update, None, keep=False)
            return
        points = self._points()
        moved = self._agree(lambda: self._scoring.in_metric_space(points))
        nearest = self._scoring.nearest(moved, update.scored, self._group)
        self._relabelled(points, update, nearest, keep=False)

    def _agree(self, work: Callable[[], T]) -> T:
        """This rank's `work`, once no rank has failed in its own."""
        return together(work, device=self._device, group=self._group)

    def _points(self) -> PairPoints:
        """The pairs of all ids (or of a sample of them), on every rank."""
        state, budget = self._state, self._task.budget
        weights = self._options.weights_of(state)
        ids, sample = state.ids, sample_hash(state)
        if budget.by_pair:
            keys, counts = self._counted(ids, weights)
        else:
            listed = self._agree(lambda: list_ids(ids, sample, most_ids(state, budget), weights))
            if not self._sum(torch.tensor([len(listed[0])], device=self._device)):
                listed = self._agree(lambda: _first_ids(ids))
            keys, counts = self._merged(*listed)
        pairs = self._agree(lambda: _drawn(ids, sample, starts_wanted(state, weights)))
        dist.all_reduce(pairs, group=self._group)
        made = self._agree(
            lambda: points_of(state, keys, counts, pairs, weights) if state.owned else None
        )
        return self._everywhere(made)

    def _counted(
        self, ids: ChunkIds, weights: IdWeights | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Pairs of all ids, rising, and their ids or weights, on the owner."""
        keys, counts = self._found(ids)
        if weights is None:
            return keys, counts
        weighted = self._grid(ids, weights)
        return keys, self._agree(lambda: taken_at(weighted, keys))

    def _found(self, ids: ChunkIds) -> tuple[torch.Tensor, torch.Tensor]:
        """As `_counted`, without weights; the grid is freed."""
        grid = self._grid(ids, None)

        def found() -> tuple[torch.Tensor, torch.Tensor]:
            keys = grid.nonzero().view(-1)
            return keys, taken_at(grid, keys)

        return self._agree(found)

    def _grid(self, ids: ChunkIds, weights: IdWeights | None) -> torch.Tensor:
        """Ids, or their weights, of every pair [k * k'], of all ranks on the owner."""
        grid = self._agree(lambda: ids.count_pairs(weights))
        dist.reduce(grid, self._source, group=self._group)
        return grid

    def _merged(
        self, listed: torch.Tensor, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `_counted`, from a list of the pairs of each rank's ids."""
        keys, counts = self._agree(lambda: _added_up(listed, weight))
        keys, counts = self._collected(keys), self._collected(counts)
        return self._agree(lambda: _added_up(keys, counts))

    def _collected(self, own: torch.Tensor) -> torch.Tensor:
        """All ranks' int64 [n] on the owner, one after the other; elsewhere nothing."""
        lengths = gather(len(own), self._group)

        def room() -> tuple[torch.Tensor, list[torch.Tensor]]:
            padded = own.new_zeros(max(lengths))
            padded[: len(own)] = own
            return padded, [torch.empty_like(padded) for _ in lengths if self._state.owned]

        padded, parts = self._agree(room)
        dist.gather(padded, parts or None, self._source, group=self._group)
        held = [own[:0], *(part[:n] for part, n in zip(parts, lengths, strict=False))]
        return self._agree(lambda: torch.cat(held))

    def _books(self) -> PairPoints:
        """The codebooks on every rank, without points."""
        owned = self._state.owned
        made = self._agree(
            lambda: codebooks_only(self._state, self._task.budget).points if owned else None
        )
        return self._everywhere(made)

    def _everywhere(self, points: PairPoints | None) -> PairPoints:
        rows = (self._task.num_rows, self._task.num_helper_rows, self._task.dim)
        shared = broadcast(points, rows, self._owner, self._device, self._group)
        assert shared is not None
        return shared

    def _relabelled(
        self,
        points: PairPoints,
        update: ChunkUpdate,
        nearest: torch.Tensor | None,
        keep: bool,
    ) -> list[NewCodes]:
        """Finds new codes of this rank's ids and takes all ranks' into account in `update`.

        Writes them part by part, or returns them if `keep`. `nearest` of all pairs; None where
        K-means saw a sample.
        """
        update.changed = 0

        def work() -> tuple[Relabelling, list[NewCodes]]:
            relabelling, kept = Relabelling(self._state, points, update), []
            for part in self._parts(points, update, nearest):
                relabelling.take(part)
                if keep:
                    kept.append(part)
                else:
                    part.write()
            return relabelling, kept

        relabelling, kept = self._agree(work)
        relabelling.add_up(self._group)
        relabelling.finish()
        return kept

    def _parts(
        self, points: PairPoints, update: ChunkUpdate, nearest: torch.Tensor | None
    ) -> Iterator[NewCodes]:
        """New codes of this rank's ids."""
        ids = self._state.ids
        if nearest is None:
            books = Sampled(ids, points, None)
            for first in ids.held[:: assign_block(self._device, points.dim)]:
                block = PairBatch.of(books, first)
                moved = self._scoring.in_metric_space(block.points)
                yield block.new_codes(self._scoring.nearest(moved, update.scored, None))
            return
        if self._task.budget.by_pair:
            yield NewCodes.of_pairs(ids, points, nearest)
            return
        keys = points.a.long() * ids.helper_rows + points.b
        packed, size = pack(nearest, ids.codes.dtype), assign_block(self._device, points.dim)
        for first in ids.held[::size]:
            last = min(first + size, ids.held.stop)
            at = torch.searchsorted(keys, ids.keys(ids.range(first, last)))
            yield NewCodes(ids, packed[at], False, first, last)

    def _sum(self, value: torch.Tensor) -> int:
        dist.all_reduce(value, group=self._group)
        return int(value)


def _held(ids: ChunkIds, wanted: torch.Tensor) -> torch.Tensor:
    """Which of `wanted` this rank holds, bool."""
    return (wanted >= ids.held.start) & (wanted < ids.held.stop)


def _first_ids(ids: ChunkIds) -> tuple[torch.Tensor, torch.Tensor]:
    """Pair and weight of those of the first ids that are held, where the sample is empty."""
    first = ids.range(0, min(ids.num_ids, ids.num_rows))
    keys = ids.keys(first[_held(ids, first)])
    return keys, torch.ones_like(keys)


def _drawn(ids: ChunkIds, sample: HashFunction, count: int) -> torch.Tensor:
    """Pairs of the ids drawn by `sample`, 0 for those of other ranks."""
    drawn = ids.drawn(sample, count)
    here, pairs = _held(ids, drawn), torch.zeros_like(drawn)
    pairs[here] = ids.keys(drawn[here])
    return pairs


def _added_up(keys: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The distinct `keys`, rising, and the sum of the `weight` of each."""
    distinct, inverse = torch.unique(keys, return_inverse=True)
    return distinct, torch.zeros_like(distinct).index_add_(0, inverse, weight)
