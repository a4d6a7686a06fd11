"""What a sharded model has in common with TorchRec's: state-dict keys, features by default."""

from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torchrec import KeyedJaggedTensor
from torchrec.modules.feature_processor_ import PositionWeightedModule
from torchrec.modules.fp_embedding_modules import FeatureProcessedEmbeddingBagCollection

from cce_torchrec import CCEEmbeddingBagConfig, cluster, finalize
from cce_torchrec.distributed.embedding_bag_sharder import CCEEmbeddingBagCollectionSharder
from cce_torchrec.distributed.embedding_collection import CCEEmbeddingCollectionSharder
from cce_torchrec.distributed.feature_processed import FeatureProcessedSharder
from tests.support.models import SUM, Model, Net, SequenceNet, batch, collection, shard, tables
from tests.support.ranks import on_ranks


def names(model):
    """Of parameters and buffers."""
    return {*dict(model.named_parameters()), *dict(model.named_buffers())}


def keys(sharded):
    """Those of the state dict, and the names of parameters and buffers, the same on every rank."""
    own = set(sharded.state_dict()), names(sharded)
    every = [None] * dist.get_world_size()
    dist.all_gather_object(every, own)
    assert all(other == own for other in every)
    return own


@on_ranks(1, 2)
@pytest.mark.parametrize("kind", ["tw", "cw", "rw"])
def test_bags(rank, world_size, kind):
    plain = Model(collection(tables(SUM)))
    expected = names(plain)
    state, named = keys(shard(plain, tables(SUM), kind))
    assert state == named == expected


@on_ranks(2)
def test_one_table_of_two_ranks(rank, world_size):
    """The rank without it has the names, and no codes."""
    configs = [replace(tables(SUM)[0], track_seen=True)]
    sharded = shard(Model(collection(configs)), configs, "tw")
    state, named = keys(sharded)
    assert state == named
    own = sharded.module.collection.codes["t"]
    assert tuple(own.codes.shape) == ((38, 12) if own.chunks else (0, 0))
    assert bool(own.chunks) == (sharded.module.collection.chunk_owners["t"][0] == rank)


@on_ranks(2)
@pytest.mark.parametrize("kind", ["tw", "cw", "rw"])
def test_every_rank_counts_the_clusterings_of_every_table(rank, world_size, kind):
    sharded = shard(Model(collection(tables(SUM))), tables(SUM), kind)
    cluster(sharded, tables=["t"])
    cluster(sharded, recipes=["rare"])  # no table is
    counts = {name: int(own.clusterings) for name, own in sharded.module.collection.codes.items()}
    assert counts == {"t": 1, "u": 0}
    finalize(sharded)
    codes = sharded.module.collection.codes
    assert [int(own.clusterings) for own in codes.values()] == [2, 1]
    assert [own.packing.bits for own in codes.values()] == [6, 12]


@on_ranks(2)
@pytest.mark.parametrize("kind", ["tw", "cw"])
def test_seen_ids_of_a_table_are_loaded_where_its_chunks_are(rank, world_size, kind, tmp_path):
    """Saved and loaded by torch's own calls: a rank without chunks has seen nothing to save."""
    configs = [replace(tables(SUM)[0], track_seen=True)]
    sharded = shard(Model(collection(configs)), configs, kind)
    sharded(batch(3, False)).wait()
    own = sharded.module.collection.codes["t"]
    before = own.seen.clone()
    assert bool(before.any()) == bool(own.chunks)
    dcp.save(sharded.state_dict(), checkpoint_id=tmp_path)
    own.seen.fill_(255)
    own.clusterings.fill_(7)
    state = sharded.state_dict()
    dcp.load(state, checkpoint_id=tmp_path)
    sharded.load_state_dict(state)
    assert int(own.clusterings) == 0
    assert torch.equal(own.seen, before) or not own.chunks


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
