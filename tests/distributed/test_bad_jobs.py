"""Jobs that are set up wrongly: an error on every rank within seconds, never a hang."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist

from cce_torchrec.clustering import cluster, meeting
from tests.distributed.ranks import run_ranks
from tests.distributed.test_checkpoint import build


def cluster_on_one_rank(rank, world_size, caller):
    """The caller learns it by the deadline, the other rank once the caller is gone."""
    model, _ = build("cw", 0)
    meeting.MEETING_SECONDS = 1.0
    began = time.perf_counter()
    if rank == caller:
        with pytest.raises(ValueError, match=r"not every rank came to cluster\(\) in 1 s"):
            cluster(model)
        dist.destroy_process_group()
        dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    else:
        with pytest.raises(RuntimeError):
            dist.all_reduce(torch.zeros(1))
    assert time.perf_counter() - began < 30  # a hang would take the group's timeout of 60 s


@pytest.mark.parametrize("caller", [0, 1])
def test_cluster_on_one_of_two_ranks(caller):
    run_ranks(2, cluster_on_one_rank, caller)
