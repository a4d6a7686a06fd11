"""The same number of batches on every rank, however many each has.

torch's `Join` is of DistributedDataParallel alone, and `DistributedSampler` of data sets whose
length is known; every step of a sharded model is collective, under any of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Generic, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from cce_torchrec.collectives import agree, check_backend, ranks_of_call

T = TypeVar("T")

_CPU = torch.device("cpu")
_gloo_groups: WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup] = WeakKeyDictionary()


def even_batches(
    batches: Iterable[T],
    *,
    empty: Callable[[], T] | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> Iterator[T]:
    """The batches of this rank, of which every rank gets the same number.

    A collective call, once an epoch. Every rank ends where the first has no more, so that the
    others leave some out; with `empty` every rank goes on until the last has no more. Where
    `batches` has a length on every rank (a list, a DataLoader), ranks agree once. Otherwise they
    agree about every batch while the one before it is trained on, by a message between CPUs, and
    so read one batch ahead. Train pipelines take what is returned as they take any iterator.

    Args:
        batches: of this rank; there may be none.
        empty: makes what a rank gets that has no more: a batch without examples, whose loss is 0.
        process_group: the ranks that train together, able to send tensors of CPUs, and used for
            nothing else meanwhile; by default all, which get a gloo group of their own.

    Raises:
        ValueError: on every rank, if ranks differ in whether they have `empty`, or the batches of
            any fail to come; on the rank itself, if `batches` has fewer than its length said.
    """
    group = _group(process_group)

    def described() -> tuple[Iterator[T], tuple[int, bool]]:
        # A DataLoader over a data set without a length has a __len__ that raises TypeError.
        try:
            length = len(batches) if isinstance(batches, Sized) else -1
        except TypeError:
            length = -1
        return iter(batches), (length, empty is not None)

    own, by_rank = agree(described, group)
    if len({has_empty for _, has_empty in by_rank}) > 1:
        raise ValueError(
            "ranks disagree about empty= of even_batches, by rank (True: given): "
            f"{[has_empty for _, has_empty in by_rank]}; give it on all or on none"
        )
    lengths = [length for length, _ in by_rank]
    if min(lengths) < 0:
        return _one_by_one(own, empty, group)
    steps = min(lengths) if empty is None else max(lengths)
    return _counted(own, 0 if group is None else lengths[dist.get_rank(group)], steps, empty)


def _group(process_group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """The ranks that agree; of all of a job one of its own, on CPUs, which the first call makes."""
    group = ranks_of_call(process_group)
    if process_group is not None:
        check_backend(_CPU, group)
    elif group is not None:
        # Apart from the training's own, whose messages are in another order where one reads ahead.
        if group not in _gloo_groups:
            _gloo_groups[group] = dist.new_group(backend="gloo")
        return _gloo_groups[group]
    return group


def _counted(
    own: Iterator[T], length: int, steps: int, empty: Callable[[], T] | None
) -> Iterator[T]:
    given = 0
    for batch in itertools.islice(own, steps):
        given += 1
        yield batch
    if given < min(length, steps):
        raise ValueError(
            f"even_batches: len(batches) is {length} and there were {given}, and the other ranks "
            "wait for the rest; pass iter(batches), about which ranks agree batch by batch"
        )
    if empty is not None:
        for _ in range(given, steps):
            yield empty()


class _Ahead(Generic[T]):
    """The next batch of this rank, and what all ranks say of theirs, which is on its way."""

    def __init__(self, own: Iterator[T], group: dist.ProcessGroup | None) -> None:
        self.batch: list[T] = []
        """At most one."""
        self.failure: Exception | None = None
        try:
            self.batch = list(itertools.islice(own, 1))
        except Exception as error:  # told to every rank, then raised there
            self.failure = error
        counts = [len(self.batch), int(self.failure is not None)]
        self._counts = torch.tensor(counts, dtype=torch.int64, device=_CPU)
        self._sent = None
        if group is not None:
            self._sent = dist.all_reduce(self._counts, group=group, async_op=True)

    def ranks_with_batch(self) -> int:
        """How many ranks have one; waits for them, and raises on every rank what failed on any."""
        if self._sent is not None:
            self._sent.wait()
        with_batch, failed = self._counts.tolist()
        if self.failure is not None:
            raise self.failure
        if failed:
            raise ValueError(f"even_batches: the batches of {failed} ranks failed; see their error")
        return with_batch


def _one_by_one(
    own: Iterator[T], empty: Callable[[], T] | None, group: dist.ProcessGroup | None
) -> Iterator[T]:
    needed = 1 if group is None or empty is not None else dist.get_world_size(group)
    ahead = _Ahead(own, group)
    while ahead.ranks_with_batch() >= needed:
        batch, ahead = ahead.batch, _Ahead(own, group)
        if batch or empty is None:
            yield batch[0]
        else:
            yield empty()
