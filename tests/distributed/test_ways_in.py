"""All that takes a model without a list of sharders, with `register_sharders` and without it."""

from __future__ import annotations

import contextlib
import sys
from types import ModuleType

import pytest
import torch.distributed as dist
from torchrec.distributed import DistributedModelParallel, model_parallel, sharding_plan
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.shard import _shard_modules, shard
from torchrec.distributed.sharding_plan import get_default_sharders as imported_before
from torchrec.modules.feature_processor_ import PositionWeightedModuleCollection
from torchrec.modules.fp_embedding_modules import FeatureProcessedEmbeddingBagCollection

from cce_torchrec import (
    CCEEmbeddingBagCollection,
    CCEEmbeddingCollection,
    make_plan,
    register_sharders,
)
from cce_torchrec.distributed import sharders
from cce_torchrec.distributed.embedding_bag_collection import ShardedCCEEmbeddingBagCollection
from cce_torchrec.distributed.embedding_bag_sharder import CCEEmbeddingBagCollectionSharder
from tests.support.models import (
    CPU,
    ROWWISE,
    SUM,
    Model,
    SequenceNet,
    batch,
    collection,
    tables,
    with_optimizer,
)
from tests.support.ranks import on_ranks

THEIRS = {"kept": imported_before}
"""In a place where `register_sharders` does not look."""


@contextlib.contextmanager
def registered():
    """`register_sharders` until the end of it, called twice."""
    register_sharders()
    ours = sharding_plan.get_default_sharders
    register_sharders()
    try:
        yield
    finally:
        for module in sys.modules.values():
            if isinstance(module, ModuleType) and module is not sharders:
                found = [name for name, value in vars(module).items() if value is ours]
                vars(module).update(dict.fromkeys(found, THEIRS["kept"]))


def pooled():
    return Model(collection(tables(SUM)))


def in_sequence():
    return Model(with_optimizer(CCEEmbeddingCollection(SequenceNet.configs()), ROWWISE))


def processed():
    weights = PositionWeightedModuleCollection({"f": 10, "g": 10, "h": 10})
    inside = collection(tables(SUM), is_weighted=True)
    return Model(FeatureProcessedEmbeddingBagCollection(inside, weights))


MODELS = {"pooled": pooled, "in sequence": in_sequence, "processed": processed}


def configs_of(model):
    in_order = isinstance(model.collection, CCEEmbeddingCollection)
    return SequenceNet.configs() if in_order else tables(SUM)


def own_planner():
    return EmbeddingShardingPlanner(
        topology=Topology(world_size=dist.get_world_size(), compute_device="cpu")
    )


def with_plan(plan):
    return lambda model: DistributedModelParallel(model, device=CPU, plan=plan(model))


WAYS = {
    "nothing": lambda model: DistributedModelParallel(model, device=CPU),
    "a plan of ours": with_plan(lambda model: make_plan(model, configs_of(model), CPU, "tw")),
    "a planner of the job's own": with_plan(
        lambda model: own_planner().collective_plan(model, None, dist.group.WORLD)
    ),
    "a planner without ranks": with_plan(
        lambda model: own_planner().plan(model, imported_before())
    ),
    "a list that was imported before": lambda model: DistributedModelParallel(
        model, device=CPU, sharders=imported_before()
    ),
    # `shard_modules` itself has torch check the names of modules, which ours are not for.
    "modules in place": lambda model: _shard_modules(model, device=CPU),
}


def sharded_inside(model):
    return [m for m in model.modules() if isinstance(m, ShardedCCEEmbeddingBagCollection)]


@on_ranks(2)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("way", WAYS)
def test_registered(rank, world_size, way, name):
    with registered():
        model = WAYS[way](MODELS[name]())
    assert len(sharded_inside(model)) == 1
    model(batch(rank, weighted=False))


@on_ranks(2)
def test_the_collection_is_the_model(rank, world_size):
    with registered():
        assert sharded_inside(DistributedModelParallel(pooled().collection, device=CPU))


def test_2d():
    """`DMPCollection` needs a GPU, so what it asks is looked at."""
    with registered():
        kinds = {sharder.module_type for sharder in model_parallel.get_default_sharders()}
    assert {CCEEmbeddingBagCollection, CCEEmbeddingCollection} <= kinds


def test_plain_models_are_sharded_as_before():
    theirs = {sharder.module_type: type(sharder) for sharder in imported_before()}
    with registered():
        now = {sharder.module_type: type(sharder) for sharder in imported_before()}
    assert all(issubclass(now[module], kind) for module, kind in theirs.items())


# TorchRec's sharder of processed collections takes what is inside for one of its own, and ends in a
# KeyError of the table's name.
ALONE = ["pooled", "in sequence"]
WITHOUT_CODES = r"'.'\]: .* about to be sharded without their codes; call cce_torchrec.register_"


@on_ranks(2)
@pytest.mark.parametrize("name", ALONE)
@pytest.mark.parametrize("way", ["nothing", "a planner of the job's own", "modules in place"])
def test_not_registered(rank, world_size, way, name):
    with pytest.raises(ValueError, match=WITHOUT_CODES):
        WAYS[way](MODELS[name]())


@on_ranks(2)
@pytest.mark.parametrize("name", ALONE)
def test_a_list_without_ours(rank, world_size, name):
    only = [EmbeddingBagCollectionSharder()]
    with pytest.raises(ValueError, match=WITHOUT_CODES):
        DistributedModelParallel(MODELS[name](), device=CPU, sharders=only)


@on_ranks(2)
@pytest.mark.parametrize("name", ALONE)
def test_a_plan_of_ours_and_a_list_without(rank, world_size, name):
    model = MODELS[name]()
    plan = make_plan(model, configs_of(model), CPU, "tw")
    with pytest.raises(KeyError, match=r"to shard it: call cce_torchrec.register_sharders\(\)"):
        DistributedModelParallel(model, device=CPU, plan=plan)


@on_ranks(2)
def test_shard_without_a_sharder(rank, world_size):
    with pytest.raises(AssertionError, match=r"to shard it: call cce_torchrec.register_sharders"):
        shard(pooled().collection, {})


class OwnPooled(CCEEmbeddingBagCollection):
    """A subclass, which no sharder takes."""


class OwnInSequence(CCEEmbeddingCollection):
    """The same."""


@on_ranks(2)
@pytest.mark.parametrize(
    ("made", "configs"), [(OwnPooled, tables(SUM)), (OwnInSequence, SequenceNet.configs())]
)
def test_a_subclass(rank, world_size, made, configs):
    """TorchRec's sharders are for exact classes: what is inside would be sharded by itself."""
    kept = made.__base__.__name__
    says = rf"inside a {made.__name__} were about .*; sharders take {kept} itself and no subclass"
    with pytest.raises(ValueError, match=says):
        DistributedModelParallel(
            Model(made(configs)), device=CPU, sharders=sharders.get_default_sharders()
        )
    assert f"sharders take {kept} itself" in repr(made)


@on_ranks(2)
def test_sequences_with_the_sharder_of_bags_alone(rank, world_size):
    only = [CCEEmbeddingBagCollectionSharder()]
    with pytest.raises(
        ValueError, match=r"inside a CCEEmbeddingCollection were .*; call cce_torch"
    ):
        DistributedModelParallel(in_sequence(), device=CPU, sharders=only)
