"""What ranks do together: where it fails on one rank, it raises on all of them.

A rank that left a collective call alone would make the others wait until the group's timeout. So a
failure is told to every rank before any of them goes on, and raised there.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

T = TypeVar("T")
S = TypeVar("S")

MEETING_SECONDS = 60.0
"""How long ranks wait for each other in `meet` (gloo)."""
_CPU = torch.device("cpu")
_TAG = 0x0CCE
"""Of the messages of `meet`, apart from those of other code."""


def ranks_of_call(process_group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """The ranks of a public call: all of the job by default; None where there is one process.

    Raises:
        ValueError: this rank is not one of them.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group = process_group if process_group is not None else dist.group.WORLD
    if dist.get_rank(group) < 0:
        # torch gives such ranks a group of -1 ranks, with which they would go on by themselves.
        raise ValueError(
            f"rank {dist.get_rank()} is not in the process group of the call; make it on the ranks "
            "of the group only, or pass a group that has this rank"
        )
    return group


def backend_of(device: torch.device, group: dist.ProcessGroup | None) -> str:
    """What sends tensors of `device` among the ranks of `group` (all of the job): "gloo", "nccl".

    "" if nothing does, or no process group was made. By device, because a group may have several
    backends ("cpu:gloo,cuda:nccl"), and one backend several spellings ("gloo", "cpu:gloo", none).
    """
    if not (dist.is_available() and dist.is_initialized()):
        return ""
    pairs = (pair.split(":") for pair in dist.get_backend_config(group).split(","))
    return {kind: backend for kind, backend in pairs}.get(device.type, "")


def check_backend(device: torch.device, group: dist.ProcessGroup | None) -> None:
    """Refuses ranks that cannot send each other the tensors of `device`.

    Raises:
        ValueError: naming the device and what the group has.
    """
    if group is None or dist.get_world_size(group) == 1 or backend_of(device, group):
        return
    raise ValueError(
        f"the tables are on {device.type} and the process group sends by "
        f"{dist.get_backend_config(group)!r} only; make it by "
        "init_process_group('cpu:gloo,cuda:nccl'), or pass another as process_group="
    )


def gather(own: T, group: dist.ProcessGroup | None) -> list[T]:
    """Every rank's object, by rank; only `own` without a group, or where it is alone there."""
    world_size = 1 if group is None else dist.get_world_size(group)
    if world_size == 1:
        return [own]
    out: list[T] = [own] * world_size
    dist.all_gather_object(out, own, group=group)
    return out


def reason(error: BaseException) -> str:
    """What `error` says, or its kind where it says nothing."""
    if isinstance(error, CheckpointException):  # which says the tracebacks of all ranks
        raised = {rank: reason(failure) for rank, (failure, _) in error.failures.items()}
        return "; ".join(f"rank {rank}: {said}" for rank, said in sorted(raised.items()))
    return str(error) or type(error).__name__


def raise_failures(failures: Sequence[str | None]) -> None:
    """Raises what went wrong, by rank; None: nothing did there.

    Raises:
        ValueError: the same on every rank, where any failed; what all say is said once.
    """
    ranks: dict[str, list[int]] = {}
    for rank, failure in enumerate(failures):
        if failure is not None:
            ranks.setdefault(failure, []).append(rank)
    messages = [
        failure if len(own) == len(failures) else f"rank {', '.join(map(str, own))}: {failure}"
        for failure, own in ranks.items()
    ]
    if messages:
        raise ValueError("; ".join(messages))


def agree(work: Callable[[], tuple[T, S]], group: dist.ProcessGroup | None) -> tuple[T, list[S]]:
    """Does `work` on every rank: what it gives this rank, and what it gives to all, by rank.

    Args:
        work: gives two things, the second of which is pickled and sent to every rank.

    Raises:
        ValueError: on every rank, with what went wrong and where, if it failed on any.
    """
    own, shared, failure = None, None, None
    try:
        own, shared = work()
    except (Exception, CheckpointException) as error:  # the latter is no Exception
        failure = reason(error)
    everyone = gather((failure, shared), group)
    raise_failures([f for f, _ in everyone])
    return own, [value for _, value in everyone]  # type: ignore[return-value,misc]  # None only where T is


class Ranks:
    """The ranks of a public call, for calls that are a row of such steps."""

    def __init__(self, process_group: dist.ProcessGroup | None) -> None:
        self.group = ranks_of_call(process_group)
        self.rank = 0 if self.group is None else dist.get_rank(self.group)
        self.size = 1 if self.group is None else dist.get_world_size(self.group)

    def agree(self, work: Callable[[], T]) -> list[T]:
        """`work()` of every rank, by rank; raises on every rank what fails on any."""
        return agree(lambda: (None, work()), self.group)[1]

    def each(self, work: Callable[[], T]) -> T:
        """`work()` of this rank, not sent to others; raises on every rank what fails on any."""
        return agree(lambda: (work(), None), self.group)[0]

    def first(self, work: Callable[[], T]) -> T:
        """`work()` of the first rank, which alone does it, on every rank."""
        return self.agree(lambda: work() if self.rank == 0 else None)[0]  # type: ignore[return-value]  # its own


def from_first_rank(work: Callable[[], T]) -> T:
    """`work()` of rank 0 of the job, on every rank; what it raises is raised on all, as it is."""
    made: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            made[0] = work()
        except Exception as error:  # told to every rank, then raised there
            made[1] = error
    dist.broadcast_object_list(made)
    if made[1] is not None:
        raise made[1]
    return made[0]


def together(
    work: Callable[..., T], *args: Any, device: torch.device, group: dist.ProcessGroup | None
) -> T:
    """`work(*args)` of this rank; collective, and where all goes well one number is sent.

    Raises:
        ValueError: on every rank, if it failed on any; without a group, what `work` raises.
    """
    if group is None:
        return work(*args)
    return add_up(torch.zeros(1, dtype=torch.float32, device=device), lambda: work(*args), group)


def add_up(numbers: torch.Tensor, work: Callable[[], T], group: dist.ProcessGroup | None) -> T:
    """`work()`, after which `numbers` are added up over all ranks.

    The last of `numbers` counts the ranks where `work` failed.

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
        raise_failures(gather(failure, group))
    return result  # type: ignore[return-value]  # None only where T is None


def same_task(
    prepare: Callable[[], tuple[T, Hashable]], what: str, group: dist.ProcessGroup | None
) -> T:
    """What `prepare` gives this rank, if the task that it names beside it is the same on all.

    Raises:
        ValueError: on every rank, if it failed on any or tasks differ, `what` being a task; without
            a group, what `prepare` raises.
    """
    if group is None:
        return prepare()[0]
    prepared, tasks = agree(prepare, group)
    if len(set(tasks)) > 1:
        raise ValueError(f"ranks disagree about ({what}): {tasks}")
    return prepared


def meet(group: dist.ProcessGroup | None) -> None:
    """Waits until every rank of `group` is here.

    Messages of their own, as a collective would match whatever the other ranks are in; and
    torch's monitored_barrier has no deadline for the ranks that wait for rank 0. They are on the
    CPU, wherever the tables are. NCCL has neither: where a group has no gloo for the CPU beside it,
    its timeout ends a job whose ranks disagree.

    Raises:
        ValueError: on the ranks that are here, if others did not come in MEETING_SECONDS.
    """
    if group is None or dist.get_world_size(group) == 1 or backend_of(_CPU, group) != "gloo":
        return
    ranks = dist.get_process_group_ranks(group)
    first, own = ranks[0], dist.get_rank()
    try:
        if own == first:
            for other in ranks[1:]:
                _receive(other, group)
            for other in ranks[1:]:
                dist.send(_message(), other, group, _TAG)
        else:
            sent = dist.isend(_message(), first, group, _TAG)
            _receive(first, group)
            assert sent is not None
            sent.wait()  # at once: the first rank has answered it
    except RuntimeError as error:
        raise ValueError(
            f"rank {own}: not every rank came to cluster() in {MEETING_SECONDS:g} s, nothing was "
            "clustered; every rank of the process group must call it after the same step, or "
            f"pass process_group=: {error}"
        ) from error


def _message() -> torch.Tensor:
    # Whatever a job has set as default: gloo sends what is on a CPU.
    return torch.zeros(1, dtype=torch.float32, device="cpu")


def _receive(source: int, group: dist.ProcessGroup) -> None:
    work = dist.irecv(_message(), source, group, _TAG)
    assert work is not None
    work.wait(timedelta(seconds=MEETING_SECONDS))
