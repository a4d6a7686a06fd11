"""finalize() under sharding: equal to the unsharded module, the same bytes on 1, 2 and 3 ranks."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType

from cce_torchrec import CCEEmbeddingBagConfig
from cce_torchrec.clustering import cluster, finalize
from cce_torchrec.clustering import plan as plans
from tests.support.clustering import fill, state_digests
from tests.support.models import MEAN, Model, batch, collection, shard
from tests.support.ranks import on_ranks
from tests.support.twins import compare, copy_state, train


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
    configs = tables(MEAN, finalized)
    return shard(Model(collection(configs, is_weighted=weighted)), configs, plan_kind)


WAYS = [("tw", plans.SHARE_FROM), ("cw", plans.SHARE_FROM), ("tw", 0)]
"""Plan, and the scores from which ranks share a chunk (0: all)."""


def digests(rank, world_size, plan_kind, share_from):
    """Of codes, codebooks and optimizer state after a clustering and finalize."""
    model = build(plan_kind)
    sharded = model.module.collection
    fill(sharded)
    with mock.patch.object(plans, "SHARE_FROM", share_from):
        cluster(model)
        report = finalize(model)
    assert {c.table for c in report.chunks} == {
        "collection.t",
        "collection.u",
    }
    return state_digests(sharded)


@pytest.fixture(scope="module")
def expected(rank_pool):
    """`digests` of one rank."""
    (found,) = rank_pool.run(1, digests, "tw", 0)
    assert len(found) == 4 + 1 + 2 + 4 + 2
    return found


@on_ranks(1, 2, 3)
@pytest.mark.parametrize(("plan_kind", "share_from"), WAYS, ids=["tw", "cw", "tw, shared"])
def test_the_same_bytes_on_1_2_and_3_ranks(rank, world_size, plan_kind, share_from, expected):
    assert digests(rank, world_size, plan_kind, share_from) == expected


@on_ranks(2)
@pytest.mark.parametrize(("plan_kind", "weighted"), [("tw", False), ("cw", True)])
def test_sharded_equals_unsharded(rank, world_size, plan_kind, weighted):
    model = build(plan_kind, weighted)
    sharded = model.module.collection
    torch.manual_seed(1)
    plain = collection(tables(MEAN), is_weighted=weighted)
    copy_state(sharded, plain)
    train(model, plain, range(2), weighted)
    copy_state(sharded, plain)
    finalize(model)
    finalize(plain)
    assert [(c.num_rows, c.num_helper_rows) for c in sharded.embedding_bag_configs()[::2]] == [
        (400, 0),
        (1200, 0),
    ]
    compare(sharded, plain, exact=True)
    train(model, plain, range(2, 5), weighted)
    compare(sharded, plain, exact=False)


@on_ranks(2)
def test_a_finalized_checkpoint_reloads(rank, world_size, tmp_path):
    """A finalized checkpoint, spread over ranks, into a model that was configured so, together."""
    model = build("cw")
    model(batch(rank, False)).wait().values().square().sum().backward()
    finalize(model)
    state = {"model": model.state_dict(), "optimizer": model.fused_optimizer.state_dict()}
    dcp.save(state, checkpoint_id=tmp_path)
    other = build("tw", finalized=True)
    state = {"model": other.state_dict(), "optimizer": other.fused_optimizer.state_dict()}
    dcp.load(state, checkpoint_id=tmp_path)
    other.load_state_dict(state["model"])
    other.fused_optimizer.load_state_dict(state["optimizer"])
    for _ in range(2):
        outputs = [m(batch(5 + rank, False)).wait().values() for m in (model, other)]
        assert torch.equal(*outputs)
        for out in outputs:
            out.square().sum().backward()
