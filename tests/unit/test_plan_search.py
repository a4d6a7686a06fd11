"""How long the search for a plan takes, in work and not in seconds, and how good the plan is."""

import random
from unittest import mock

import pytest
import torch
import torchrec
from torch import nn
from torchrec.distributed.planner import EmbeddingShardingPlanner
from torchrec.distributed.planner.shard_estimators import EmbeddingPerfEstimator
from torchrec.distributed.types import ShardingType
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from cce_torchrec import CCEEmbeddingBagCollection, CCEEmbeddingBagConfig
from cce_torchrec.distributed.sharders import get_default_sharders
from cce_torchrec.planning import make_planner

CPU = torch.device("cpu")
AMPLE = 1 << 42


def cce(i, ids, dim=64, features=1):
    return CCEEmbeddingBagConfig(
        name=f"t{i}", num_embeddings=ids, embedding_dim=dim, num_rows=max(16, ids // 100),
        feature_names=[f"f{i}_{j}" for j in range(features)],
    )  # fmt: skip


def plain(i, ids, dim=64):
    return EmbeddingBagConfig(
        name=f"t{i}", num_embeddings=ids, embedding_dim=dim, feature_names=[f"f{i}"]
    )


def model(tables):
    made = CCEEmbeddingBagCollection(tables=tables, device="meta")
    apply_optimizer_in_backward(torchrec.optim.RowWiseAdagrad, list(made.parameters()), {"lr": 0.1})
    return nn.ModuleDict({"sparse": made})


def planned(tables, world_size, memory=AMPLE, kind="auto", proposers=None):
    """The planner after it has planned, and how many shards it estimated the time of."""
    shards = []
    estimate = EmbeddingPerfEstimator.estimate

    def counting(self, sharding_options, *args, **named):
        shards.extend(shard for option in sharding_options for shard in option.shards)
        return estimate(self, sharding_options, *args, **named)

    planner = make_planner(tables, world_size, CPU, kind, memory_bytes=memory)
    planner._proposers = proposers or planner._proposers
    planner._stats = []
    with mock.patch.object(EmbeddingPerfEstimator, "estimate", counting):
        planner.plan(model(tables), get_default_sharders())
    return planner, len(shards)


def work(tables, world_size, memory=AMPLE):
    planner, shards = planned(tables, world_size, memory)
    return planner._num_proposals, shards


@pytest.mark.parametrize("world_size", [2, 8])
@pytest.mark.parametrize("sizes", ["equal", "unequal"])
def test_many_tables_are_as_much_work_as_plain_ones(sizes, world_size):
    """None is so large that a rank is late by it, so that none has to be split."""
    ids = random.Random(0)
    rows = [100_000 if sizes == "equal" else int(10 ** ids.uniform(4, 7)) for _ in range(100)]
    compressed = [cce(i, n) for i, n in enumerate(rows)]
    assert work(compressed, world_size) == work(
        [plain(i, n) for i, n in enumerate(rows)], world_size
    )


@pytest.mark.parametrize(
    ("count", "world_size"),
    [
        (13, 8),  # TorchRec's GridSearchProposer takes up to 10,000 proposals: 8,192 here
        (100, 16),
        (200, 1024),
    ],
)
def test_the_search_does_not_grow_with_the_tables(count, world_size):
    """At most 40 proposals for each of three orders: 32 steps and 4 without a better plan."""
    tables = [cce(i, 10_000 * (1 + i % 7)) for i in range(count)]
    proposals, shards = work(tables, world_size)
    assert 1 < proposals <= 3 * 40
    assert shards == 2 * count  # whole, and one column of each


def test_many_tables_in_little_memory():
    """Tables are split until they fit, several at a time."""
    tables = [cce(i, 1_000_000) for i in range(100)]
    memory = int(sum(table.table_bytes for table in tables) / 8 / 0.8)  # of which 0.85 may be used
    proposals, _ = work(tables, 8, memory)
    assert proposals <= 3 * 40


def rating(planner):
    return planner._perf_model.rate(planner._best_plan)


def mixed(seed, count, features=(1,), dims=(16, 64, 256)):
    chosen = random.Random(seed)
    return [
        cce(i, 10 ** chosen.randint(4, 7), chosen.choice(dims), chosen.choice(features))
        for i in range(count)
    ]


def half_plain(seed, count):
    chosen = random.Random(seed)
    return [chosen.choice([cce, plain])(i, int(10 ** chosen.uniform(4, 6.5))) for i in range(count)]


def fill(tables, world_size, share):
    """Memory of a rank of which `tables` take the `share`."""
    return int(sum(t.table_bytes for t in tables) / world_size / share)


LARGE = [cce(i, 20_000_000 * (i + 1), dim=128) for i in range(5)]
MANY = [cce(i, 30_000) for i in range(100)]
JOBS = {
    "few large": (LARGE, 8, AMPLE),
    "few of several widths": (mixed(1, 8), 8, AMPLE),
    "of many features": (mixed(1, 30, features=(1, 1, 1, 8, 20)), 8, AMPLE),
    "many small": (MANY, 8, AMPLE),
    "half of them plain": (half_plain(1, 60), 16, AMPLE),
    "little memory": (mixed(3, 40, dims=(64,)), 8, fill(mixed(3, 40, dims=(64,)), 8, 0.8)),
    "less memory": (mixed(3, 20, dims=(64,)), 4, fill(mixed(3, 20, dims=(64,)), 4, 0.75)),
}


@pytest.mark.parametrize("job", JOBS)
def test_plans_are_not_worse_than_those_of_torchrecs_search(job):
    """By the planner's own estimate of the time of the slowest rank."""
    tables, world_size, memory = JOBS[job]
    both = [ShardingType.TABLE_WISE.value, ShardingType.COLUMN_WISE.value]
    theirs = EmbeddingShardingPlanner(topology=make_planner(tables, world_size, CPU)._topology)
    with mock.patch(
        "cce_torchrec.planning.planner.worth_splitting", lambda *_: {t.name for t in tables}
    ):
        before, _ = planned(tables, world_size, memory, proposers=theirs._proposers)
    after, _ = planned(tables, world_size, memory)
    assert {option.sharding_type for option in before._best_plan} <= set(both)
    assert rating(after) <= rating(before) * (1 + 1e-9)


def test_a_table_that_holds_up_its_rank_is_split():
    """One of 20 features and 256 columns, beside tables of one feature."""
    tables = [cce(0, 1_000_000, dim=256, features=20), *(cce(i, 10_000) for i in range(1, 30))]
    planner, _ = planned(tables, 8)
    kinds = {option.name: option.sharding_type for option in planner._best_plan}
    assert kinds["t0"] == "column_wise"
    whole, _ = planned(tables, 8, kind="tw")
    assert rating(planner) < 0.5 * rating(whole)
