"""What a sharded model has in common with TorchRec's: state-dict keys, features by default."""

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torchrec import KeyedJaggedTensor
from torchrec.modules.feature_processor_ import PositionWeightedModule
from torchrec.modules.fp_embedding_modules import FeatureProcessedEmbeddingBagCollection

from cce_torchrec import CCEEmbeddingBagConfig, finalize
from cce_torchrec.distributed.embedding_bag_sharder import CCEEmbeddingBagCollectionSharder
from cce_torchrec.distributed.embedding_collection import CCEEmbeddingCollectionSharder
from cce_torchrec.distributed.feature_processed import FeatureProcessedSharder
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


def test_the_sharder_of_feature_processors_takes_what_torchrecs_does():
    bags = CCEEmbeddingBagCollectionSharder({"learning_rate": 0.5})
    model = FeatureProcessedEmbeddingBagCollection(
        collection(tables(SUM), is_weighted=True),
        {name: PositionWeightedModule(3) for name in "fgh"},
    )
    with mock.patch.object(bags, "shardable_parameters", return_value={"asked": None}):
        assert FeatureProcessedSharder(bags).shardable_parameters(model) == {"asked": None}


@on_ranks(1)
def test_a_table_without_features_is_planned_and_sharded(rank, world_size):
    configs = [
        CCEEmbeddingBagConfig(name="x", num_embeddings=9, embedding_dim=8, num_rows=2, num_chunks=2)
    ]
    sharded = shard(Model(collection(configs)), configs, "tw")
    kjt = KeyedJaggedTensor(["x"], torch.tensor([3, 4]), lengths=torch.tensor([2]))
    assert sharded(kjt)["x"].shape == (1, 8)
