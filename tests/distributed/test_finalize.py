"""finalize() under sharding: equal to the unsharded module, the same bytes on 1, 2 and 3 ranks."""

from __future__ import annotations

import hashlib

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torchrec.distributed import DistributedModelParallel
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType

from cce_torchrec import CCEEmbeddingBagConfig
from cce_torchrec.clustering import cluster, finalize
from cce_torchrec.clustering import plan as plans
from cce_torchrec.clustering.local_chunks import fused_rows
from cce_torchrec.distributed.sharders import get_default_sharders
from cce_torchrec.planning import make_plan
from tests.distributed import test_sharded as sharded_tests
from tests.distributed.test_sharded import (
    CPU,
    Model,
    batch,
    collection,
    compare,
    copy_state,
    train,
)
from tests.support.ranks import run_ranks


def tables(pooling, finalized=False):
    """Codes of t become wider (100 + 300 rows); those of u do not."""
    rows = {"t": (100, 300), "u": (300, 900)}
    if finalized:
        rows = {name: (main + helper, 0) for name, (main, helper) in rows.items()}
    return [
        CCEEmbeddingBagConfig(
            name="t", num_embeddings=900, embedding_dim=16, feature_names=["f", "g"],
            num_rows=rows["t"][0], num_helper_rows=rows["t"][1], pooling=pooling,
        ),
        EmbeddingBagConfig(
            name="p", num_embeddings=40, embedding_dim=8, feature_names=["h", "f"],
            pooling=PoolingType.SUM,
        ),
        CCEEmbeddingBagConfig(
            name="u", num_embeddings=1000, embedding_dim=8, feature_names=["h"], num_chunks=2,
            num_rows=rows["u"][0], num_helper_rows=rows["u"][1], pooling=pooling,
        ),
    ]  # fmt: skip


def build(plan_kind, weighted=False, finalized=False):
    sharded_tests.tables = lambda pooling: tables(pooling, finalized)  # in this process only
    model = Model(collection(PoolingType.MEAN, weighted, "rowwise"))
    plan = make_plan(model, sharded_tests.tables(PoolingType.MEAN), CPU, plan_kind)
    return DistributedModelParallel(model, device=CPU, plan=plan, sharders=get_default_sharders())


def digests(rank, world_size):
    """Codes, codebooks and optimizer state after a clustering and finalize."""
    out = {}
    for plan_kind, share_from in (("tw", plans.SHARE_FROM), ("cw", plans.SHARE_FROM), ("tw", 0)):
        model = build(plan_kind)
        sharded = model.module.collection
        for name, (weight, state) in sorted(fused_rows(sharded).items()):
            g = torch.Generator().manual_seed(sum(map(ord, name)))
            weight.copy_(torch.randn(weight.shape, generator=g))
            for value in state.values():
                value.copy_(torch.rand(value.shape, generator=g))
        usual, plans.SHARE_FROM = plans.SHARE_FROM, share_from
        cluster(model)
        report = finalize(model)
        plans.SHARE_FROM = usual
        assert {c.table for c in report.chunks} == {
            "_dmp_wrapped_module.collection.t",
            "_dmp_wrapped_module.collection.u",
        }
        local = {}
        for name, (weight, state) in fused_rows(sharded).items():
            data = [weight, *state.values()]
            local[name] = hashlib.sha256(b"".join(v.numpy().tobytes() for v in data)).hexdigest()
        for name, part in sharded.codes.items():
            for i, chunk in enumerate(part.chunks):
                column = part.codes[:, i].contiguous().numpy()
                local[f"{name}@{chunk}"] = hashlib.sha256(column.tobytes()).hexdigest()
        gathered = [None] * world_size
        dist.all_gather_object(gathered, local)
        out[plan_kind, share_from] = {k: v for part in gathered for k, v in part.items()}
    return out


def equal_to_unsharded(rank, world_size):
    for plan_kind, weighted in (("tw", False), ("cw", True)):
        model = build(plan_kind, weighted)
        sharded = model.module.collection
        torch.manual_seed(1)
        plain = collection(PoolingType.MEAN, weighted, "rowwise")
        copy_state(sharded, plain)
        train(model, plain, weighted, range(2), rank, world_size)
        copy_state(sharded, plain)
        finalize(model)
        finalize(plain)
        assert [(c.num_rows, c.num_helper_rows) for c in sharded.embedding_bag_configs()[::2]] == [
            (400, 0),
            (1200, 0),
        ]
        compare(sharded, plain, exact=True)
        train(model, plain, weighted, range(2, 5), rank, world_size)
        compare(sharded, plain, exact=False)


def reload(rank, world_size, folder):
    """A finalized checkpoint, spread over ranks, into a model that was configured so, together."""
    model = build("cw")
    model(batch(rank, False)).wait().values().square().sum().backward()
    finalize(model)
    state = {"model": model.state_dict(), "optimizer": model.fused_optimizer.state_dict()}
    dcp.save(state, checkpoint_id=folder)
    other = build("tw", finalized=True)
    state = {"model": other.state_dict(), "optimizer": other.fused_optimizer.state_dict()}
    dcp.load(state, checkpoint_id=folder)
    other.load_state_dict(state["model"])
    other.fused_optimizer.load_state_dict(state["optimizer"])
    for _ in range(2):
        outputs = [m(batch(5 + rank, False)).wait().values() for m in (model, other)]
        assert torch.equal(*outputs)
        for out in outputs:
            out.square().sum().backward()


def everything(rank, world_size, folder):
    equal_to_unsharded(rank, world_size)
    reload(rank, world_size, folder)
    return digests(rank, world_size)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    return run_ranks(2, everything, str(tmp_path_factory.mktemp("finalized")))


def test_sharded_equals_unsharded_and_reloads(two_ranks):
    assert len(two_ranks) == 2  # the checks ran inside the ranks


def test_the_same_bytes_on_1_2_and_3_ranks(two_ranks):
    found = [two_ranks[0], *(run_ranks(n, digests)[0] for n in (1, 3))]
    reference = found[0]["tw", 0]
    assert len(reference) == 4 + 1 + 2 + 4 + 2
    for by_plan in found:
        for digest in by_plan.values():
            assert digest == reference
