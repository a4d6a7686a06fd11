"""One scan of all points, shared among the ranks of a process group in fixed blocks."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from cce_torchrec.kmeans.backends import SCORE_BYTES, Backend, make_backend
from cce_torchrec.kmeans.points import BLOCK, Points

T = TypeVar("T")


def gathered(own: T, group: dist.ProcessGroup | None) -> list[T]:
    """Every rank's object, by rank; only `own` without a group, or where it is alone there."""
    world_size = 1 if group is None else dist.get_world_size(group)
    if world_size == 1:
        return [own]
    out: list[T] = [own] * world_size
    dist.all_gather_object(out, own, group=group)
    return out


def raise_failures(failures: list[str | None]) -> None:
    """Raises ValueError, the same on every rank, where any rank failed."""
    named = [f"rank {rank}: {f}" for rank, f in enumerate(failures) if f is not None]
    if named:
        raise ValueError("; ".join(named) if len(failures) > 1 else failures[0])


def reason(error: BaseException) -> str:
    """What `error` says, or its kind where it says nothing."""
    return str(error) or type(error).__name__


def agreed(
    work: Callable[..., T], *args: Any, device: torch.device, group: dist.ProcessGroup | None
) -> T:
    """`work(*args)` of this rank; collective, and one number crosses the network.

    Raises:
        ValueError: on every rank, if it failed on any; without a group, what `work` raises.
    """
    if group is None:
        return work(*args)
    return _summed(torch.zeros(1, device=device), lambda: work(*args), group)


def _summed(numbers: torch.Tensor, work: Callable[[], T], group: dist.ProcessGroup | None) -> T:
    """`work()`, after which `numbers` are added up over all ranks.

    What a rank does between two collectives must not end on it alone, or the others wait for it
    until the group's timeout: the last of `numbers` counts the ranks where `work` failed.

    Raises:
        ValueError: on every rank, if it failed on any.
    """
    result, failure = None, None
    try:
        result = work()
    except Exception as error:  # told to every rank, then raised there
        failure = reason(error)
    numbers[-1] = failure is not None
    dist.all_reduce(numbers, group=group)
    if int(numbers[-1]):
        raise_failures(gathered(failure, group))
    return result  # type: ignore[return-value]  # None only where T is None


def check_agreement(
    failure: Exception | None, task: Hashable, what: str, group: dist.ProcessGroup | None
) -> None:
    """Raises ValueError on every rank if one failed or their tasks differ; `what` names a task."""
    everyone = gathered((reason(failure) if failure else None, task), group)
    raise_failures([f for f, _ in everyone])
    tasks = [t for _, t in everyone]
    if len(set(tasks)) > 1:
        raise ValueError(f"ranks disagree about ({what}): {tasks}")


class Share:
    """This rank's points, [start, end), cut at whole blocks, and the sums over all ranks.

    What collectives need is allocated here; a rank that fails while it scores takes part in the
    next one all the same, with a mark, upon which every rank raises.
    """

    def __init__(self, points: Points, k: int, group: dist.ProcessGroup | None) -> None:
        self._group = group
        rank, world_size = 0, 1
        if group is not None:
            rank, world_size = dist.get_rank(group), dist.get_world_size(group)
        self._alone = world_size == 1
        blocks = -(-points.num_points // BLOCK)
        self.start = min(points.num_points, blocks * rank // world_size * BLOCK)
        self.end = min(points.num_points, blocks * (rank + 1) // world_size * BLOCK)
        # The last number of each counts the ranks that failed.
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

        assigned = score() if self._alone else _summed(self._stats, score, self._group)
        return (*self._sums, assigned)

    def nearest(self, points: Points, centroids: torch.Tensor, engine: Backend) -> torch.Tensor:
        """The nearest of `centroids` for every point, from every rank's; int32 [n]."""
        if self._alone:
            return engine.prepare(points, centroids)(self.start, self.end)

        def score() -> None:
            self._own()[:] = engine.prepare(points, centroids)(self.start, self.end)

        _summed(self._everyone, score, self._group)
        return self._everyone[:-1]

    def _own(self) -> torch.Tensor:
        return self._everyone[self.start : self.end]

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

    share, engine = agreed(prepared, device=points.device, group=process_group)
    return share.nearest(points, centroids, engine)
