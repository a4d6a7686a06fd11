"""The keys of a sharded model's state dict are its parameters and buffers, as in TorchRec."""

import pytest
import torch.distributed as dist

from cce_torchrec import finalize
from cce_torchrec.distributed.embedding_collection import CCEEmbeddingCollectionSharder
from tests.support.models import SUM, Model, Net, SequenceNet, collection, shard, tables
from tests.support.ranks import on_ranks


def keys(sharded):
    """Those of the state dict, and the names of parameters and buffers, on all ranks together."""
    names = {*dict(sharded.named_parameters()), *dict(sharded.named_buffers())}
    every = [None] * dist.get_world_size()
    dist.all_gather_object(every, (set(sharded.state_dict()), names))
    return (set.union(*part) for part in zip(*every, strict=True))


@on_ranks(1, 2)
@pytest.mark.parametrize("kind", ["tw", "cw", "rw"])
def test_bags(rank, world_size, kind):
    state, names = keys(shard(Model(collection(tables(SUM))), tables(SUM), kind))
    assert state == names


@on_ranks(2)
def test_after_finalize(rank, world_size):
    sharded = shard(Model(collection(tables(SUM))), tables(SUM), "tw")
    finalize(sharded)
    state, names = keys(sharded)
    assert state == names
    buffers = dict(sharded.named_buffers())
    counts = [int(v) for k, v in buffers.items() if k.endswith("num_helper_rows")]
    assert not any(counts)


@on_ranks(2)
@pytest.mark.parametrize("net", [Net, SequenceNet])
def test_with_dense_layers(rank, world_size, net):
    configs = net.configs()
    state, names = keys(shard(net(configs), configs, "tw"))
    assert state == names


def test_the_sharder_of_sequences_takes_what_torchrecs_does():
    assert CCEEmbeddingCollectionSharder({}, None, use_index_dedup=True).fused_params == {}
