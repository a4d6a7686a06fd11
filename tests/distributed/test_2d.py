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
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from cce_torchrec.checkpoint import load_checkpoint, save_checkpoint
from cce_torchrec.clustering import cluster
from cce_torchrec.clustering.local_chunks import fused_rows
from cce_torchrec.distributed.sharders import get_default_sharders
from cce_torchrec.planning import make_planner
from tests.distributed.test_checkpoint import OPTIMIZERS, SCHEDULE, Net, load_all, outputs, step
from tests.distributed.test_inputs import SUM
from tests.distributed.test_sharded import CPU, tables
from tests.support.ranks import run_ranks


def two_groups(kind, rank, world_size):
    """A model of which each half of the ranks holds all tables, as DMPCollection makes it.

    Returns the model, its dense optimizer and the group of the copies of a rank's chunks.
    """
    model = Net(tables(SUM))
    cls, settings = OPTIMIZERS["rowwise"]
    apply_optimizer_in_backward(cls, list(model.collection.parameters()), dict(settings))
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


def cluster_and_save(rank, world_size, folder):
    """Copies that differ are refused; equal ones stay so, and are saved as one."""
    saved = {}
    for kind in ("tw", "cw", "rw"):
        torch.manual_seed(7 + len(saved))
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
        saved[where] = ("rowwise", before, outputs(model))
    return saved


def load_in_groups(rank, world_size, saved):
    for kind in ("tw", "cw", "rw"):
        model, dense, replica_pg = two_groups(kind, rank, world_size)
        for where, (_, before, after) in saved.items():
            load_checkpoint(where, model, optimizers=[dense])
            check_copies(model, replica_pg)
            for a, b in zip(outputs(model), before, strict=True):
                assert np.array_equal(a, b), (where, kind)
            step(model, dense, 7)
            for a, b in zip(outputs(model), after, strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5, err_msg=f"{where} {kind}")
            cluster(model)
            check_copies(model, replica_pg)


def four_ranks(rank, world_size, folder):
    saved = cluster_and_save(rank, world_size, folder)
    load_in_groups(rank, world_size, saved)
    load_all(rank, world_size, ["cw"], saved, Net)
    return saved


def test_copies_stay_equal_and_load_anywhere(tmp_path):
    saved = run_ranks(4, four_ranks, str(tmp_path))[0]
    for world_size, kinds in ((2, ["tw", "dp"]), (1, ["unsharded"])):
        run_ranks(world_size, load_all, kinds, saved, Net)
