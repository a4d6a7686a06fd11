"""2D parallelism on four ranks: two groups that each hold all tables.

`DMPCollection` itself asks for a GPU; what it does (a plan remapped to the ranks of each sharding
group, `ShardingEnv2D`, averages over replica groups) is done here by hand over gloo.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.remote_device import _remote_device
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.model_parallel import DMPCollection
from torchrec.distributed.types import ShardingEnv2D

from cce_torchrec.checkpoint import load_checkpoint, save_checkpoint
from cce_torchrec.clustering import cluster
from cce_torchrec.clustering.local_chunks import fused_rows
from cce_torchrec.distributed.sharders import get_default_sharders
from cce_torchrec.planning import make_planner
from tests.support.jobs import SCHEDULE, assert_same_outputs, load_jobs, outputs, step
from tests.support.models import CPU, ROWWISE, SUM, Net, tables, with_optimizer
from tests.support.ranks import on_ranks

KINDS = ["tw", "cw", "rw"]


def two_groups(kind, rank, world_size, frozen=""):
    """A model of which each half of the ranks holds all tables, as DMPCollection makes it.

    Returns the model, its dense optimizer and the group of the copies of a rank's chunks.
    """
    model = Net(tables(SUM))
    with_optimizer(model.collection, ROWWISE)
    for name, parameter in model.collection.named_parameters():
        parameter.requires_grad_(not frozen or f".{frozen}#" not in name)
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
    model = DistributedModelParallel(model, env, CPU, plan, get_default_sharders())
    over = [p for name, p in model.named_parameters() if "over" in name]
    return model, torch.optim.Adam(over, lr=0.05), replica_pg


def check_copies(model, replica_pg):
    """Codebooks, optimizer state, codes and clusterings are bit-equal in all groups."""
    sharded = model.module.collection
    own = {}
    for name, (weight, state) in fused_rows(sharded).items():
        own |= {f"{name}.{key}": value for key, value in {"": weight, **state}.items()}
    for name, part in sharded.codes.items():
        own |= {f"{name}.{key}": value for key, value in part.named_buffers()}
    copies = [None] * 2
    dist.all_gather_object(copies, own, group=replica_pg)
    assert copies[0].keys() == copies[1].keys() and own
    for name in own:
        assert torch.equal(copies[0][name], copies[1][name]), name


def cluster_and_save(rank, world_size, folder, kind):
    """Copies that differ are refused; equal ones stay so, and are saved as one."""
    torch.manual_seed(7 + KINDS.index(kind))
    model, dense, replica_pg = two_groups(kind, rank, world_size)
    for seed in range(2):
        step(model, dense, 10 * seed + rank)
    with pytest.raises(ValueError, match=r"differs from that on rank 0.*sync"):
        cluster(model)
    for weight, state in fused_rows(model.module.collection).values():
        for tensor in (weight, *state.values()):
            dist.all_reduce(tensor, group=replica_pg)
            tensor /= 2
    cluster(model)
    check_copies(model, replica_pg)
    step(model, dense, 6)
    where = f"{folder}/{kind} in two groups"
    save_checkpoint(where, model, step=3, optimizers=[dense], schedule=SCHEDULE, extra={"a": 1})
    before = outputs(model)
    step(model, dense, 7)
    return {where: ("rowwise", before, outputs(model))}


@pytest.fixture(scope="module")
def saved(rank_pool, tmp_path_factory):
    """A checkpoint of every kind of plan in two groups."""
    found, folder = {}, str(tmp_path_factory.mktemp("groups"))
    for kind in KINDS:
        found |= rank_pool.run(4, cluster_and_save, folder, kind)[0]
    return found


@on_ranks(4)
@pytest.mark.parametrize("kind", KINDS)
def test_copies_stay_equal(rank, world_size, kind, saved):
    """Checkpoints of all plans load into two groups, which step and cluster alike."""
    model, dense, replica_pg = two_groups(kind, rank, world_size)
    for where, (_, before, after) in saved.items():
        load_checkpoint(where, model, optimizers=[dense])
        check_copies(model, replica_pg)
        assert_same_outputs(model, before)
        step(model, dense, 7)
        for a, b in zip(outputs(model), after, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5, err_msg=where)
        cluster(model)
        check_copies(model, replica_pg)


ONE_GROUP = [(4, "cw"), (2, "tw"), (2, "dp"), (1, "unsharded")]


@pytest.mark.parametrize(("world_size", "kind"), ONE_GROUP)
def test_one_group_loads_them(rank_pool, world_size, kind, saved):
    rank_pool.run(world_size, load_jobs, kind, saved)


@on_ranks(4)
def test_a_frozen_table_stays_equal_in_both_groups(rank, world_size):
    """It needs no sync() before a clustering, as no group has changed it."""
    torch.manual_seed(7)
    model, dense, replica_pg = two_groups("cw", rank, world_size, frozen="t")
    held = {n: w.clone() for n, (w, _) in fused_rows(model.module.collection).items()}
    step(model, dense, rank)
    for name, (weight, state) in fused_rows(model.module.collection).items():
        assert torch.equal(weight, held[name]) == name.startswith("t#")
        for tensor in (weight, *state.values()) if not name.startswith("t#") else ():
            dist.all_reduce(tensor, group=replica_pg)
            tensor /= 2
    report = cluster(model)
    assert [path.rpartition(".")[2] for path in report.left_alone] == ["t"]
    check_copies(model, replica_pg)
    after = fused_rows(model.module.collection)
    assert all(torch.equal(after[n][0], w) == n.startswith("t#") for n, w in held.items())
