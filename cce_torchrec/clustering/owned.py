"""One chunk, by its owner alone or with its scoring shared among ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from cce_torchrec.clustering.budget import assign_block
from cce_torchrec.clustering.chunk import ChunkState, ChunkUpdate, Relabelling, new_main_rows
from cce_torchrec.clustering.id_passes import NewCodes
from cce_torchrec.clustering.options import Options
from cce_torchrec.clustering.pairs import (
    PairBatch,
    Sampled,
    broadcast,
    codebooks_only,
    find_pairs,
    of_all_ids,
)
from cce_torchrec.clustering.plan import Task
from cce_torchrec.clustering.scoring import Scoring
from cce_torchrec.collectives import reason, together
from cce_torchrec.kmeans.lloyd import KMeansResult
from cce_torchrec.kmeans.points import PairPoints

T = TypeVar("T")


class Solver:
    """The steps of one chunk's clustering; with a `group`, collective: every rank calls each.

    The owner (a rank of the group) has the `state`; the other ranks score their share of what it
    sends. Results are the same bytes however many ranks there are.
    """

    def __init__(
        self,
        state: ChunkState | None,
        task: Task,
        options: Options,
        device: torch.device,
        group: dist.ProcessGroup | None = None,
        owner: int = 0,
    ) -> None:
        self._state, self._task, self._options = state, task, options
        self._device, self._group, self._owner = device, group, owner
        self._scoring = Scoring(task, options, device)
        self._failure: str | None = None

    def solve(self, keep_codes: bool) -> ChunkUpdate | None:
        """What the step will write, for the owner; with the new codes if `keep_codes`.

        Raises:
            ValueError: on every rank, if any fails.
        """
        sampled, points = self._find(for_kmeans=True)
        result = self._scoring.kmeans(points, self._group)
        update = self._try(new_main_rows, self._state, points, result)
        parts: list[NewCodes] = []
        if keep_codes:
            parts = list(self._new_codes(sampled, points, update, result))
        if update is not None:
            update.codes = parts
        self._agreed(lambda: None)
        return update

    def write_codes(self, update: ChunkUpdate | None) -> None:
        """Finds the new codes that were not kept, and writes them part by part."""
        everyone = self._task.budget.samples_per_centroid is None
        sampled, points = self._find(for_kmeans=everyone)
        for part in self._new_codes(sampled, points, update, None):
            self._try(part.write)
        self._agreed(lambda: None)

    def _try(self, work: Callable[..., T], *args: Any) -> T | None:
        """Work of the owner alone; what fails there is raised at the next agreement."""
        if self._state is None or self._failure is not None:
            return None
        try:
            return work(*args)
        except Exception as error:  # the others wait for this rank's messages
            if self._group is None:
                raise
            self._failure = reason(error)
            return None

    def _agreed(self, work: Callable[..., T], *args: Any) -> T:
        """Work of every rank; raises on every rank if it fails on one, or the owner has failed."""

        def checked() -> T:
            if self._failure is not None:
                raise ValueError(self._failure)
            return work(*args)

        return together(checked, device=self._device, group=self._group)

    def _find(self, for_kmeans: bool) -> tuple[Sampled | None, PairPoints]:
        """The chunk's pairs, where they live, and as points everywhere; else codebooks only."""
        weights = self._try(self._options.weights_of, self._state)
        find = find_pairs if for_kmeans else codebooks_only
        sampled = self._try(find, self._state, self._task.budget, weights)
        return sampled, self._everywhere(sampled.points if sampled else None)

    def _everywhere(self, points: PairPoints | None) -> PairPoints:
        """The owner's points on every rank."""
        if self._group is not None:
            task = self._task
            rows = (task.num_rows, task.num_helper_rows, task.dim)
            points = broadcast(points, rows, self._owner, self._device, self._group)
            if points is None:
                self._agreed(lambda: None)
        assert points is not None
        return points

    def _new_codes(
        self,
        sampled: Sampled | None,
        points: PairPoints,
        update: ChunkUpdate | None,
        result: KMeansResult | None,
    ) -> Iterator[NewCodes]:
        """New codes in parts, on the owner, which takes them into account in `update`.

        By lookup of all pairs, or scored in blocks of ids where K-means saw a sample of them.
        """
        relabelling = self._try(Relabelling, self._state, points, update)
        if self._task.budget.samples_per_centroid is None:
            assignment = self._assign(points, update) if result is None else result.assignment
            parts = iter([self._try(of_all_ids, sampled, assignment)])
        else:
            parts = self._scored_blocks(sampled, points, update)
        for part in parts:
            if part is not None and relabelling is not None:
                self._try(relabelling.take, part)
                yield part
        if relabelling is not None:
            self._try(relabelling.finish)

    def _scored_blocks(
        self, sampled: Sampled | None, points: PairPoints, update: ChunkUpdate | None
    ) -> Iterator[NewCodes | None]:
        size = assign_block(self._device, self._task.dim)
        for first in range(0, self._task.num_ids, size):
            block = self._try(PairBatch.of, sampled, first)
            shared = self._everywhere(block.points if block else None)
            nearest = self._assign(shared, update)
            yield self._try(block.new_codes, nearest) if block else None

    def _assign(self, points: PairPoints, update: ChunkUpdate | None) -> torch.Tensor:
        """Nearest of the centroids that K-means scored last, scored by all ranks."""
        k, dim = self._task.num_clusters, self._task.dim

        def prepared() -> tuple[PairPoints, torch.Tensor]:
            scored = update.scored if update else torch.empty(k, dim, device=self._device)
            return self._scoring.in_metric_space(points), scored

        moved, scored = self._agreed(prepared)
        if self._group is not None:
            dist.broadcast(scored, dist.get_global_rank(self._group, self._owner), self._group)
        return self._scoring.nearest(moved, scored, self._group)
