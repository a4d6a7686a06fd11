"""One scan of all points, shared among the ranks of a process group in fixed blocks."""

from __future__ import annotations

import torch
import torch.distributed as dist

from cce_torchrec.collectives import add_up, together
from cce_torchrec.kmeans.backends import SCORE_BYTES, Backend, make_backend
from cce_torchrec.kmeans.points import BLOCK, Points


class Share:
    """This rank's points, [start, end), cut at whole blocks, and the sums over all ranks.

    What collectives need is allocated here; a rank that fails while it scores takes part in the
    next one all the same, with a mark, upon which every rank raises.
    """

    def __init__(self, points: Points, k: int, group: dist.ProcessGroup | None) -> None:
        self._group = group
        rank, world_size, self._first_rank = 0, 1, 0
        if group is not None:
            rank, world_size = dist.get_rank(group), dist.get_world_size(group)
            # Broadcasts name a rank of the job, whatever the group.
            self._first_rank = dist.get_global_rank(group, 0)
        self._alone = world_size == 1
        blocks = -(-points.num_points // BLOCK)
        self.start = min(points.num_points, blocks * rank // world_size * BLOCK)
        self.end = min(points.num_points, blocks * (rank + 1) // world_size * BLOCK)
        # One tensor, so that an iteration needs one collective. The last number counts ranks that
        # failed.
        size, device = k * (points.dim + 2) + 1, points.device
        self._stats = torch.zeros(size, dtype=torch.int64, device=device)
        sums, sizes, errors, _ = self._stats.split([k * points.dim, k, k, 1])
        self._sums = sums.view(k, points.dim), sizes, errors
        size = 0 if self._alone else points.num_points + 1
        self._everyone = torch.zeros(size, dtype=torch.int32, device=device)

    def scan(
        self, points: Points, centroids: torch.Tensor, engine: Backend
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Sums [k, s], sizes [k] and errors [k] over all ranks, and this rank's assignment.

        Sums, sizes and errors are views that the next scan overwrites.
        """
        self._stats.zero_()

        def score() -> torch.Tensor:
            assigned = engine.prepare(points, centroids)(self.start, self.end)
            points.accumulate(self.start, assigned, centroids, points.error_scale, self._sums)
            return assigned

        assigned = score() if self._alone else add_up(self._stats, score, self._group)
        return (*self._sums, assigned)

    def nearest(self, points: Points, centroids: torch.Tensor, engine: Backend) -> torch.Tensor:
        """The nearest of `centroids` for every point, from every rank's; int32 [n]."""
        if self._alone:
            return engine.prepare(points, centroids)(self.start, self.end)

        def score() -> None:
            self._own()[:] = engine.prepare(points, centroids)(self.start, self.end)

        add_up(self._everyone, score, self._group)
        return self._everyone[:-1]

    def _own(self) -> torch.Tensor:
        return self._everyone[self.start : self.end]

    def from_first_rank(self, centroids: torch.Tensor) -> torch.Tensor:
        """The first rank's centroids, on every rank."""
        if not self._alone:
            dist.broadcast(centroids, self._first_rank, group=self._group)
        return centroids

    def gather(self, assigned: torch.Tensor) -> torch.Tensor:
        """The assignment of all points, from every rank's."""
        if self._alone:
            return assigned
        self._own()[:] = assigned
        dist.all_reduce(self._everyone, group=self._group)
        return self._everyone[:-1]


def assign(
    points: Points,
    centroids: torch.Tensor,
    *,
    backend: str = "auto",
    process_group: dist.ProcessGroup | None = None,
    score_bytes: int = SCORE_BYTES,
) -> torch.Tensor:
    """The nearest of `centroids` [k, s] for every point, int32 [n]; ties go to the lowest index.

    Collective where a process group is given, as `cce_torchrec.kmeans.kmeans`, and the same
    bytes as its final assignment to the same centroids.

    Raises:
        ValueError: on every rank, if any fails.
    """

    def prepared() -> tuple[Share, Backend]:
        share = Share(points, len(centroids), process_group)
        return share, make_backend(backend, points.device, score_bytes)

    share, engine = together(prepared, device=points.device, group=process_group)
    return share.nearest(points, centroids, engine)
