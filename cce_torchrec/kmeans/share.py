"""One scan of all points, shared among the ranks of a process group in fixed blocks."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TypeVar

import torch
import torch.distributed as dist

from cce_torchrec.kmeans.backends import SCORE_BYTES, Backend, make_backend
from cce_torchrec.kmeans.points import BLOCK, Points

T = TypeVar("T")


def gathered(own: T, group: dist.ProcessGroup | None) -> list[T]:
    """Every rank's object, by rank; only `own` without a group."""
    if group is None:
        return [own]
    out: list[T] = [own] * dist.get_world_size(group)
    dist.all_gather_object(out, own, group=group)
    return out


def raise_failures(failures: list[str | None]) -> None:
    """Raises ValueError, the same on every rank, where any rank failed."""
    named = [f"rank {rank}: {f}" for rank, f in enumerate(failures) if f is not None]
    if named:
        raise ValueError("; ".join(named) if len(failures) > 1 else failures[0])


def check_agreement(
    failure: Exception | None, task: Hashable, what: str, group: dist.ProcessGroup | None
) -> None:
    """Raises ValueError on every rank if one failed or their tasks differ; `what` names a task."""
    everyone = gathered((str(failure) if failure else None, task), group)
    raise_failures([f for f, _ in everyone])
    tasks = [t for _, t in everyone]
    if len(set(tasks)) > 1:
        raise ValueError(f"ranks disagree about ({what}): {tasks}")


class Share:
    """This rank's points, [start, end), cut at whole blocks, and the sums over all ranks."""

    def __init__(self, points: Points, k: int, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self._num_points, self._k, self._dim = points.num_points, k, points.dim
        rank, world_size = 0, 1
        if group is not None:
            rank, world_size = dist.get_rank(group), dist.get_world_size(group)
        self._alone = world_size == 1
        blocks = -(-points.num_points // BLOCK)
        self.start = min(points.num_points, blocks * rank // world_size * BLOCK)
        self.end = min(points.num_points, blocks * (rank + 1) // world_size * BLOCK)

    def scan(
        self, points: Points, centroids: torch.Tensor, engine: Backend
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Sums [k, s], sizes [k] and errors [k] over all ranks, and this rank's assignment."""
        k, dim = self._k, self._dim
        assigned = engine.prepare(points, centroids)(self.start, self.end)
        flat = torch.zeros(k * (dim + 2), dtype=torch.int64, device=points.device)
        sums, sizes, errors = flat[: k * dim].view(k, dim), flat[k * dim : -k], flat[-k:]
        stats = (sums, sizes, errors)
        points.accumulate(self.start, assigned, centroids, points.error_scale(), stats)
        if not self._alone:
            dist.all_reduce(flat, group=self._group)
        return sums, sizes, errors, assigned

    def from_first_rank(self, centroids: torch.Tensor) -> torch.Tensor:
        """The first rank's centroids, on every rank."""
        if not self._alone:
            assert self._group is not None
            dist.broadcast(centroids, dist.get_global_rank(self._group, 0), group=self._group)
        return centroids

    def gather(self, assigned: torch.Tensor) -> torch.Tensor:
        """The assignment of all points, from every rank's."""
        if self._alone:
            return assigned
        out = torch.zeros(self._num_points, dtype=torch.int32, device=assigned.device)
        out[self.start : self.end] = assigned
        dist.all_reduce(out, group=self._group)
        return out


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
    """
    share = Share(points, len(centroids), process_group)
    engine = make_backend(backend, points.device, score_bytes)
    return share.gather(engine.prepare(points, centroids)(share.start, share.end))
