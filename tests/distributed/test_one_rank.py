"""A rank that is alone in its group sends nothing: what holds on several ranks holds there too."""

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torchrec import KeyedJaggedTensor
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.planner.types import ParameterConstraints, PlannerError
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from cce_torchrec import CCEEmbeddingBagCollection, CCEEmbeddingBagConfig
from cce_torchrec.distributed.sharders import get_default_sharders
from cce_torchrec.planning import make_plan, make_planner
from tests.support.models import CPU, shard_by
from tests.support.ranks import on_ranks
from tests.support.twins import constrained


@on_ranks(1)
def test_nothing_is_waited_for(rank, world_size):
    """Without TorchRec's awaitables, whose output it has; with them where somebody watches."""
    configs = [
        CCEEmbeddingBagConfig(name=f"t{i}", num_embeddings=100, embedding_dim=8, num_chunks=2,
                              feature_names=[f"f{i}"], num_rows=7, num_helper_rows=5)
        for i in range(2)
    ]  # fmt: skip
    unsharded = CCEEmbeddingBagCollection(configs)
    model = nn.Sequential(CCEEmbeddingBagCollection(configs))
    plan = make_plan(model, configs, CPU, "tw")
    sharded = DistributedModelParallel(
        model, device=CPU, plan=plan, sharders=get_default_sharders(), init_data_parallel=False
    )
    collection = sharded.module[0]
    collection.load_state_dict(unsharded.state_dict())
    lengths = torch.tensor([2, 0, 1, 3], dtype=torch.int32)
    ids = KeyedJaggedTensor(["f0", "f1"], torch.tensor([3, 1, 4, 1, 5, 9]), lengths=lengths)

    def names_of(call):
        with profile(activities=[ProfilerActivity.CPU]) as found:
            out = call(ids)
            values = out.values()
        return out, values, {event.key for event in found.key_averages() if "##" in event.key}

    expected = unsharded(ids)
    out, values, names = names_of(collection)
    assert torch.equal(values, expected.values())
    assert torch.equal(out.wait().values(), values) and out.keys() == expected.keys()
    assert torch.equal(out["f1"].wait(), expected["f1"])
    assert not any("Awaitable" in name and "NoWait" not in name for name in names), names

    seen = []
    collection.embedding_bag_collection.register_post_lookup_tracker_fn(
        lambda features, embeddings, module, _: seen.append(embeddings)
    )
    out, values, names = names_of(collection)
    assert torch.equal(values, expected.values()) and len(seen) == 1
    assert any("Splits" in name for name in names), names

    with pytest.raises(ValueError, match="lacks features 'f1'"):
        collection(KeyedJaggedTensor(["f0"], torch.tensor([1]), lengths=torch.tensor([1])))


@on_ranks(1)
def test_columns_of_a_plain_table(rank, world_size):
    """A plain table of two features in column shards, whose outputs TorchRec has to sort."""
    torch.manual_seed(0)
    configs = [
        EmbeddingBagConfig(
            name="plain", num_embeddings=50, embedding_dim=64, feature_names=["a", "b"]
        ),
        CCEEmbeddingBagConfig(name="t", num_embeddings=100, embedding_dim=8, num_chunks=2,
                              feature_names=["f"], num_rows=7, num_helper_rows=5),
    ]  # fmt: skip
    unsharded = CCEEmbeddingBagCollection(configs)
    model = nn.Sequential(CCEEmbeddingBagCollection(configs))
    in_columns = ParameterConstraints(sharding_types=["column_wise"], min_partition=32)
    planner = constrained(make_planner(configs, 1, CPU), plain=in_columns)
    plan = planner.plan(model, get_default_sharders())
    (entries,) = plan.plan.values()
    assert len(entries["plain"].sharding_spec.shards) == 2
    collection = shard_by(plan, model).module[0]
    collection.load_state_dict(unsharded.state_dict())
    lengths = torch.tensor([2, 0, 1, 3, 1, 2], dtype=torch.int32)
    ids = KeyedJaggedTensor(["a", "b", "f"], torch.arange(9), lengths=lengths)
    assert torch.equal(collection(ids).values(), unsharded(ids).values())


@on_ranks(1)
def test_plans_count_the_dense_network(rank, world_size):
    """The dense network's parameters, gradients and moments leave less room to the tables."""
    configs = [
        CCEEmbeddingBagConfig(name="t", num_embeddings=10**6, embedding_dim=8, num_chunks=2,
                              feature_names=["f"], num_rows=70)
    ]  # fmt: skip
    memory = 12 << 20
    model = nn.Sequential(CCEEmbeddingBagCollection(configs, device="meta"), nn.Linear(1, 1))
    assert make_plan(model, configs, CPU, memory_bytes=memory)
    model.append(nn.Linear(500, 1000, device="meta"))  # 2 MB, of which there are six
    with pytest.raises(PlannerError):
        make_plan(model, configs, CPU, memory_bytes=memory)
