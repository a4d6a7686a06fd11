"""Jobs that are set up wrongly: an error on every rank within seconds, never a hang."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist
from torchrec.distributed.planner.types import PlannerError
from torchrec.distributed.sharding_plan import get_default_sharders as without_ours

from cce_torchrec import collectives
from cce_torchrec.clustering import cluster
from cce_torchrec.distributed.sharders import get_default_sharders
from cce_torchrec.planning import make_plan, make_planner
from tests.support.jobs import build
from tests.support.models import CPU, SUM, Model, collection, shard_by, tables
from tests.support.ranks import on_ranks, run_ranks


def cluster_on_one_rank(rank, world_size, caller):
    """The caller learns it by the deadline, the other rank once the caller is gone."""
    model, _ = build("cw", 0)
    collectives.MEETING_SECONDS = 1.0
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


def usual():
    return Model(collection(tables(SUM)))


@on_ranks(2)
def test_a_plan_of_more_ranks(rank, world_size):
    model = usual()
    plan = make_planner(tables(SUM), 4, CPU, "cw").plan(model, get_default_sharders())
    with pytest.raises(ValueError, match=r"the plan puts it on rank 3, the job has 2 ranks"):
        shard_by(plan, model)


@on_ranks(2)
def test_sharders_of_torchrec_alone(rank, world_size):
    model = usual()
    plan = make_plan(model, tables(SUM), CPU, "cw")
    with pytest.raises(KeyError, match="CCEEmbeddingBagCollection"):  # TorchRec's own
        shard_by(plan, model, without_ours())
    with pytest.raises(ValueError, match=r"sharded without their codes; give .* sharders="):
        shard_by(None, model, without_ours())


@on_ranks(2)
def test_tables_that_do_not_fit(rank, world_size):
    with pytest.raises(PlannerError):
        make_plan(usual(), tables(SUM), CPU, "cw", memory_bytes=10_000)
