"""torch.distributed.checkpoint: saved at one world size and plan, loaded at any other."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torchrec.distributed import DistributedModelParallel
from torchrec.modules.embedding_configs import PoolingType

from cce_torchrec import CCEEmbeddingBagCollection, CCEEmbeddingBagConfig
from cce_torchrec.clustering import cluster
from cce_torchrec.distributed.embedding_bag_collection import get_default_sharders
from cce_torchrec.planner import make_plan
from tests.distributed.ranks import run_ranks
from tests.distributed.test_sharded import CPU, Model, batch, collection, tables

BATCHES = [3, 4, 5, 6]


def build(kind, seed):
    torch.manual_seed(seed)
    model = Model(collection(PoolingType.SUM, False, "rowwise"))
    if kind == "unsharded":
        return model
    plan = make_plan(model, tables(PoolingType.SUM), CPU, kind)
    return DistributedModelParallel(model, device=CPU, plan=plan, sharders=get_default_sharders())


def state_of(model):
    state = {"model": model.state_dict()}
    if isinstance(model, DistributedModelParallel):
        state["optimizer"] = model.fused_optimizer.state_dict()
    return state


def outputs(model):
    """Of fixed batches, the same on every rank; trains nothing."""
    with torch.no_grad():
        outs = [model(batch(seed, False)) for seed in BATCHES]
        return [(o.wait() if hasattr(o, "wait") else o).values().numpy().copy() for o in outs]


def train(model):
    """Two steps on fixed batches and a clustering step; returns what follows."""
    for seed in (1, 2):
        out = model(batch(seed, False))
        (out.wait() if hasattr(out, "wait") else out).values().square().sum().backward()
    report = cluster(model)
    return outputs(model), [c.objective_after for c in report.chunks]


def save(rank, world_size, folder, kind):
    model = build(kind, seed=rank)
    train(model)
    dcp.save(state_of(model), checkpoint_id=f"{folder}/{world_size}-{kind}")
    before = outputs(model)
    return before, train(model)


def load_all(rank, world_size, folder, saved):
    results = {}
    for name in saved:
        for kind in ("tw", "cw", "unsharded"):
            model = build(kind, seed=100 + rank)
            state = state_of(model)
            dcp.load(state, checkpoint_id=f"{folder}/{name}")
            model.load_state_dict(state["model"])
            if "optimizer" in state:
                model.fused_optimizer.load_state_dict(state["optimizer"])
            before = outputs(model)
            results[name, kind] = (before, train(model) if kind != "unsharded" else None)
    return results


def wrong_shapes(rank, world_size, folder, name):
    """Codes of another table size: an error that names both, on every rank that holds them."""
    for change, found in (({"num_embeddings": 301}, "[301, 4]"), ({"num_chunks": 2}, "[300, 2]")):
        config = CCEEmbeddingBagConfig(
            **{
                **dict(name="t", num_embeddings=300, embedding_dim=16, feature_names=["f"]),
                "num_rows": 5,
                **change,
            }
        )
        made = CCEEmbeddingBagCollection(tables=[config])
        plan_of = Model(made)
        plan = make_plan(plan_of, [config], CPU, "tw")
        model = DistributedModelParallel(
            plan_of, device=CPU, plan=plan, sharders=get_default_sharders()
        )
        other = build("tw", 0)
        state = model.state_dict()
        state["collection.codes.t.codes"] = other.state_dict()["collection.codes.t.codes"]
        with pytest.raises(ValueError, match="table 't': the checkpoint has codes") as error:
            model.load_state_dict(state)
        assert "[300, 4]" in str(error.value) and found in str(error.value)
    dist.barrier()


def load_and_fail(rank, world_size, folder, saved):
    wrong_shapes(rank, world_size, folder, saved[0])
    return load_all(rank, world_size, folder, saved)


def test_any_world_size_and_plan_to_any_other(tmp_path):
    saved, expected = [], {}
    for world_size, kind in ((2, "cw"), (1, "tw")):
        name = f"{world_size}-{kind}"
        saved.append(name)
        expected[name] = run_ranks(world_size, save, str(tmp_path), kind)[0]
    for world_size in (1, 2, 3):
        for results in run_ranks(world_size, load_and_fail, str(tmp_path), saved):
            for (name, _), (before, after) in results.items():
                for a, b in zip(before, expected[name][0], strict=True):
                    assert np.array_equal(a, b), name
                if after is None:
                    continue
                # Every rank feeds the same batch, so the mean gradient is that of one rank, to
                # rounding; codes may then differ for ids on a boundary, objectives hardly.
                assert after[1] == pytest.approx(expected[name][1][1], rel=1e-3)
