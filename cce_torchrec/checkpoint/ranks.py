"""Work that every rank does and that fails on every rank if it fails on one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

T = TypeVar("T")


class Ranks:
    """The ranks of a process group (None: the default group, or this process alone)."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self._alone = not (dist.is_available() and dist.is_initialized())
        self.rank = 0 if self._alone else dist.get_rank(group)
        self.size = 1 if self._alone else dist.get_world_size(group)

    def agree(self, work: Callable[[], T]) -> list[T]:
        """`work()` of every rank, by rank.

        Raises:
            ValueError: on every rank, with what went wrong and where, if it failed on any.
        """
        result, failure = None, None
        try:
            result = work()
        except (Exception, CheckpointException) as error:  # the latter is no Exception
            failure = str(error) or type(error).__name__
        everyone: list[tuple[T | None, str | None]] = [(result, failure)]
        if not self._alone:
            everyone = [(None, None)] * self.size
            dist.all_gather_object(everyone, (result, failure), group=self.group)
        failures: dict[str, list[int]] = {}
        for rank, (_, message) in enumerate(everyone):
            if message is not None:
                failures.setdefault(message, []).append(rank)
        if failures:
            raise ValueError("; ".join(_told(m, r, self.size) for m, r in failures.items()))
        return [value for value, _ in everyone]  # type: ignore[misc]  # None only where T is None

    def first(self, work: Callable[[], T]) -> T:
        """`work()` of rank 0, which alone does it, on every rank."""
        result = self.agree(lambda: work() if self.rank == 0 else None)[0]
        return result  # type: ignore[return-value]  # rank 0's own


def _told(message: str, ranks: list[int], size: int) -> str:
    if len(ranks) == size:
        return message
    return f"rank {', '.join(map(str, ranks))}: {message}"
