"""A collective call that some rank never makes ends in an error, where that can be seen."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist

MEETING_SECONDS = 60.0
"""How long ranks wait for each other before a clustering step (gloo)."""
_TAG = 0x0CCE


def meet(group: dist.ProcessGroup | None) -> None:
    """Waits until every rank of `group` is here.

    Messages of their own, as a collective would match whatever the other ranks are in; and
    torch's monitored_barrier has no deadline for the ranks that wait for rank 0. NCCL has neither:
    there the group's timeout ends a job whose ranks disagree.

    Raises:
        ValueError: on the ranks that are here, if others did not come in MEETING_SECONDS.
    """
    if group is None or dist.get_backend(group) != "gloo" or dist.get_world_size(group) == 1:
        return
    ranks = dist.get_process_group_ranks(group)
    first, own = ranks[0], dist.get_rank()
    try:
        if own == first:
            for other in ranks[1:]:
                _receive(other, group)
            for other in ranks[1:]:
                dist.send(torch.zeros(1), other, group, _TAG)
        else:
            sent = dist.isend(torch.zeros(1), first, group, _TAG)
            _receive(first, group)
            assert sent is not None
            sent.wait()  # at once: the first rank has answered it
    except RuntimeError as error:
        raise ValueError(
            f"rank {own}: not every rank came to cluster() in {MEETING_SECONDS:g} s, nothing was "
            "clustered; every rank of the process group must call it after the same step, or "
            f"pass process_group=: {error}"
        ) from error


def _receive(source: int, group: dist.ProcessGroup) -> None:
    work = dist.irecv(torch.zeros(1), source, group, _TAG)
    assert work is not None
    work.wait(timedelta(seconds=MEETING_SECONDS))
