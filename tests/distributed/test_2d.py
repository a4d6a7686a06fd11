"""2D parallelism on four ranks: two groups that each hold all tables.

`DMPCollection` itself asks for a GPU; what it does (a plan remapped to the ranks of each sharding
group, `ShardingEnv2D`, averages over replica groups) is done here by hand over gloo.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.remote_device import _remote_device
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.model_parallel import DMPCollection
from torchrec.distributed.types import ShardingEnv2D

from cce_torchrec.clustering import cluster
from cce_torchrec.clustering.live import fused_rows
from cce_torchrec.distributed.sharders import get_default_sharders
from cce_torchrec.planner import make_planner
from tests.distributed.ranks import run_ranks
from tests.distributed.test_inputs import SUM
from tests.distributed.test_sharded import CPU, Model, batch, collection, tables


def two_groups(kind, rank, world_size):
    """A model of which each half of the ranks holds all tables, as DMPCollection makes it."""
    model = Model(collection(SUM, False, "rowwise"))
    planner = make_planner(tables(SUM), 2, CPU, kind)
    plan = planner.collective_plan(model, get_default_sharders(), dist.group.WORLD)
    stand_in = SimpleNamespace(_device=CPU)
    mesh, sharding_pg, replica_pg = DMPCollection._create_process_groups(
        stand_in, rank, world_size, 2
    )
    DMPCollection._remap_sharding_plan(stand_in, plan, rank, world_size // 2, 2)
    for sharding in plan.plan["collection"].values():
        for shard in sharding.sharding_spec.shards:  # "cpu:3" is no device
            shard.placement = _remote_device(f"rank:{shard.placement.rank()}/cpu")
    env = ShardingEnv2D(
        sharding_pg=sharding_pg, replica_pg=replica_pg, global_pg=dist.group.WORLD,
        device_mesh=mesh, node_group_size=2,
    )  # fmt: skip
    return DistributedModelParallel(model, env, CPU, plan, get_default_sharders()), replica_pg


def replicas_stay_equal(rank, world_size):
    torch.manual_seed(rank)
    for kind in ("tw", "cw"):
        model, replica_pg = two_groups(kind, rank, world_size)
        sharded = model.module.collection
        for seed in range(2):
            model(batch(10 * seed + rank, False)).wait().values().square().sum().backward()
        with pytest.raises(ValueError, match=r"differs from that on rank 0.*sync"):
            cluster(model)
        for weight, state in fused_rows(sharded).values():
            for tensor in (weight, *state.values()):
                dist.all_reduce(tensor, group=replica_pg)
                tensor /= 2
        cluster(model)
        own = {name: weight for name, (weight, _) in fused_rows(sharded).items()}
        own |= {f"{name}.codes": part.codes for name, part in sharded.codes.items()}
        copies = [None] * 2
        dist.all_gather_object(copies, own, group=replica_pg)
        assert copies[0].keys() == copies[1].keys() and own
        for name in own:
            assert torch.equal(copies[0][name], copies[1][name]), name
        model(batch(rank, False)).wait().values().square().sum().backward()


def test_replicas_stay_equal():
    run_ranks(4, replicas_stay_equal)
