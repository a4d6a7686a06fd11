"""Sequence embeddings under sharding: equal to the unsharded module, bad ids, pipelines."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torchrec import KeyedJaggedTensor
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.modules.embedding_configs import DataType, EmbeddingConfig
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from cce_torchrec import CCEEmbeddingBagConfig, CCEEmbeddingCollection
from cce_torchrec.clustering import cluster, finalize
from cce_torchrec.planning import make_plan
from tests.support.models import (
    CPU,
    KEYS,
    SGD,
    STRIDE,
    SUM,
    Batch,
    Model,
    SequenceNet,
    batch,
    shard,
    shard_by,
    step_outputs,
    vbe_batch,
    with_optimizer,
)
from tests.support.ranks import on_ranks
from tests.support.twins import Pair, flat


def made():
    """A collection of two CCE tables and a plain one."""
    shape = dict(embedding_dim=16, num_embeddings=300)
    return CCEEmbeddingCollection(
        [
            CCEEmbeddingBagConfig(name="t", feature_names=["f", "g"], num_rows=5, **shape),
            EmbeddingConfig(name="p", feature_names=["h", "f"], **shape),
            CCEEmbeddingBagConfig(name="u", feature_names=["h"], num_rows=9, num_chunks=2, **shape),
        ],
        need_indices=True,
    )


@on_ranks(1, 2)
@pytest.mark.parametrize("kind", ["tw", "cw", "tcw"])
def test_sequences_equal_unsharded(rank, world_size, kind):
    """Embeddings of every id: the same outputs, weights and codes as unsharded."""
    pair = Pair(kind, (), SUM, False, make=made)
    pair.check(batch)
    kjt = batch(3, False)
    out = pair.model(kjt).wait()
    for name, jagged in out.items():
        own = kjt[name.split("@")[0]]
        assert torch.equal(jagged.lengths(), own.lengths())
        assert torch.equal(jagged.weights(), own.values())
    if kind != "tw":
        assert len(set(pair.sharded.chunk_owners["t"])) == world_size
    context = pair.model.module.collection.create_context()
    arrived = pair.model.module.collection.input_dist(context, kjt).wait().wait()
    received = torch.tensor(sum(part.values().numel() for part in arrived))
    dist.all_reduce(received)
    owners = {n: len(set(ranks)) for n, ranks in pair.sharded.chunk_owners.items()}
    per_rank = sum(
        kjt[feature].values().numel() * owners.get(config.name, 1)
        for config in pair.sharded.embedding_bag_configs()
        for feature in config.feature_names
    )
    assert received == per_rank * world_size  # every rank put the same batch in
    with pytest.raises(ValueError, match="one batch size for all features"):
        pair.model(vbe_batch(rank, False))


@on_ranks(1, 2, 3)
@pytest.mark.parametrize(
    ("kind", "data_parallel"),
    [("rw", ()), ("tw", ("t",)), ("cw", ("p",)), ("rw", ("u", "p")), ("tw", ("t", "p", "u"))],
)
def test_row_wise_and_data_parallel(rank, world_size, kind, data_parallel):
    """Features of unequal numbers of ids, before and after a clustering step."""
    pair = Pair(kind, data_parallel, SUM, False, make=made)
    pair.check(batch)
    assert pair.sharded.data_parallel == set(data_parallel)
    assert bool(pair.sharded.id_partitions) == (kind == "rw")


def without_ids(seed, weighted):
    """Rank 0 has no id at all, the other has none of one feature."""
    kjt = batch(seed, weighted)
    lengths = kjt.lengths().view(len(KEYS), STRIDE).clone()
    lengths[slice(None) if seed % 10 == 0 else 1] = 0  # ten times the step, and the rank
    return KeyedJaggedTensor(KEYS, kjt.values()[: int(lengths.sum())], lengths=lengths.view(-1))


@on_ranks(2)
@pytest.mark.parametrize(("kind", "data_parallel"), [("rw", ()), ("tw", ("t", "p", "u"))])
def test_ranks_without_ids(rank, world_size, kind, data_parallel):
    pair = Pair(kind, data_parallel, SUM, False, make=made)
    pair.copy()
    pair.train(without_ids, (0, 1))
    pair.compare(exact=False)


@on_ranks(2)
def test_row_wise_and_finalized(rank, world_size):
    """An id is one row from then on, and arrives as one."""
    pair = Pair("rw", (), SUM, False, make=made)
    pair.copy()
    finalize(pair.model)
    finalize(pair.plain)
    pair.compare(exact=True)
    pair.train(batch, (0, 1))
    pair.compare(exact=False)


@on_ranks(1, 2)
def test_bad_ids_read_id_0_and_are_counted(rank, world_size):
    """Ids out of bounds read id 0 and are counted by each owner; no feature may be missing."""
    pair = Pair("cw", (), SUM, False, make=lambda: CCEEmbeddingCollection(SequenceNet.configs()))
    pair.copy()
    kjt = batch(rank, False)
    ids, read = kjt.values().clone(), kjt.values().clone()
    ids[::5], read[::5] = torch.tensor([-1, 300, 2**40])[torch.arange(len(ids[::5])) % 3], 0
    bad, good = (
        KeyedJaggedTensor(KEYS, v, lengths=kjt.lengths(), stride=STRIDE) for v in (ids, read)
    )
    assert torch.equal(flat(pair.model(bad).wait()), flat(pair.module(good)))
    assert torch.equal(bad.values(), ids) and bool((ids != read).any())
    counted = torch.tensor([pair.model.module.collection.num_invalid_ids, 0])
    for config in pair.sharded.embedding_bag_configs():
        owners = len(set(pair.sharded.chunk_owners.get(config.name, [0])))
        for feature in config.feature_names:
            own = bad[feature].values()
            counted[1] += owners * ((own < 0) | (own >= 300)).sum()
    dist.all_reduce(counted)
    assert counted[0] == counted[1] > 0
    with pytest.raises(ValueError, match=r"lacks features 'g' \(table 't'\), 'h' \(table 'p'\)"):
        pair.model(KeyedJaggedTensor(["f"], kjt["f"].values(), lengths=kjt["f"].lengths()))


@on_ranks(2)
@pytest.mark.parametrize("of_one", ["optimizer", "rate", "type"])
def test_tables_of_a_rank_without_a_common_kernel(rank, world_size, of_one):
    """Refused on every rank, where FBGEMM refused the first batch of one, and others waited."""
    t, _, u = SequenceNet.configs()
    if of_one == "type":
        u = replace(u, data_type=DataType.FP16)
    model = Model(CCEEmbeddingCollection([t, u]))
    optimizers = {"optimizer": (RowWiseAdagrad, 0.1), "rate": (torch.optim.SGD, 0.2)}
    kind, rate = optimizers.get(of_one, (torch.optim.SGD, 0.1))
    bags = model.collection.embeddings
    apply_optimizer_in_backward(torch.optim.SGD, bags["t"].parameters(), {"lr": 0.1})
    apply_optimizer_in_backward(kind, bags["u"].parameters(), {"lr": rate})
    plan = make_plan(model, [t, u], CPU, "tw")
    for sharding in plan.plan["collection"].values():
        sharding.ranks[:] = [1]
        sharding.sharding_spec.shards[0].placement = torch.distributed._remote_device("rank:1/cpu")
    with pytest.raises(ValueError, match=r"rank 1: chunks \[\['t#0'.*take sequences in one kernel"):
        shard_by(plan, model)


@on_ranks(2)
def test_a_rank_without_tables(rank, world_size):
    """One table on one rank: the other has nothing to look up, and both get embeddings."""
    config = CCEEmbeddingBagConfig(
        name="t", num_embeddings=300, embedding_dim=16, feature_names=["f"], num_rows=5
    )
    model = Model(CCEEmbeddingCollection([config]))
    model = shard(model, [config], "tw")
    kjt = batch(rank, False)
    assert model(kjt).wait()["f"].values().shape == (len(kjt["f"].values()), 16)


class SequenceLoss(nn.Module):
    """A dense layer over every embedding, as pipelines expect it: (loss, output)."""

    def __init__(self):
        super().__init__()
        table = CCEEmbeddingBagConfig(
            name="t", num_embeddings=300, embedding_dim=16, feature_names=["f", "g"], num_rows=5
        )
        self.collection = with_optimizer(CCEEmbeddingCollection([table]), SGD)
        self.over = nn.Linear(16, 1)

    def forward(self, data):
        out = self.collection(data.ids)
        out = self.over(torch.cat([out["f"].values(), out["g"].values()]))
        return out.square().mean(), out.detach()


@on_ranks(2)
@pytest.mark.parametrize("kind", ["cw", "rw"])
def test_pipelined_sequences(rank, world_size, kind):
    """The sparse-dist pipeline equals the plain loop, a clustering step between included."""
    outputs = []
    for pipeline in (None, TrainPipelineSparseDist):
        torch.manual_seed(0)
        model = SequenceLoss()
        plan = make_plan(model, model.collection.embedding_configs(), CPU, kind)
        torch.manual_seed(1)
        data = [Batch(batch(10 * step + rank, False)) for step in range(5)]
        outputs.append(step_outputs(shard_by(plan, model), data, pipeline, cluster_after=[2]))
    for plain, piped in zip(*outputs, strict=True):
        assert torch.equal(plain, piped)


@on_ranks(2)
def test_a_clustering_step_does_not_overtake_a_lookup(rank, world_size):
    model = Model(with_optimizer(made(), SGD))
    model = shard_by(make_plan(model, made().embedding_configs(), CPU, "tw"), model)
    out = flat(model(batch(rank, False)).wait())
    with pytest.raises(ValueError, match=r"tables \['t', 'u'\]: 1 of their lookups wait for"):
        cluster(model)
    out.sum().backward()
    assert cluster(model).chunks


def test_a_gradient_of_unsharded_sequences_from_before_a_step_is_refused():
    collection = made()
    out = flat(collection(batch(0, False)))
    cluster(collection)
    with pytest.raises(ValueError, match=r"tables \['t', 'u'\]: the codes changed between"):
        out.sum().backward()
