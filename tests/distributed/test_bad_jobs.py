"""Jobs that are set up wrongly: an error on every rank within seconds, never a hang."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.planner.types import PlannerError
from torchrec.distributed.sharding_plan import get_default_sharders as without_ours
from torchrec.modules.embedding_configs import PoolingType

from cce_torchrec import collectives
from cce_torchrec.clustering import cluster
from cce_torchrec.distributed.sharders import get_default_sharders
from cce_torchrec.planning import make_plan, make_planner
from tests.distributed.test_checkpoint import build
from tests.distributed.test_sharded import CPU, Model, collection, tables
from tests.support.ranks import run_ranks


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


def wrong_plans(rank, world_size):
    model = Model(collection(PoolingType.SUM, False, "rowwise"))
    plan = make_planner(tables(PoolingType.SUM), 4, CPU, "cw").plan(model, get_default_sharders())
    with pytest.raises(ValueError, match=r"the plan puts it on rank 3, the job has 2 ranks"):
        DistributedModelParallel(model, device=CPU, plan=plan, sharders=get_default_sharders())
    model = Model(collection(PoolingType.SUM, False, "rowwise"))
    plan = make_plan(model, tables(PoolingType.SUM), CPU, "cw")
    with pytest.raises(KeyError, match="CCEEmbeddingBagCollection"):  # TorchRec's own
        DistributedModelParallel(model, device=CPU, plan=plan, sharders=without_ours())
    with pytest.raises(ValueError, match=r"sharded without their codes; give .* sharders="):
        DistributedModelParallel(model, device=CPU, sharders=without_ours())
    with pytest.raises(PlannerError):
        make_plan(model, tables(PoolingType.SUM), CPU, "cw", memory_bytes=10_000)


def test_plans_and_sharders_that_do_not_fit():
    run_ranks(2, wrong_plans)
