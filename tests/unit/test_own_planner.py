"""TorchRec's own planner, without constraints, of models with CCE collections."""

import random
from collections import Counter

import pytest
import torch
import torchrec
from torch import nn
from torchrec import EmbeddingBagCollection
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from cce_torchrec import CCEEmbeddingBagCollection, CCEEmbeddingBagConfig, get_default_sharders
from cce_torchrec.planning import make_planner

CPU = torch.device("cpu")


def plain(count, dim):
    chosen = random.Random(1)
    return [
        EmbeddingBagConfig(
            name=f"t{i}", num_embeddings=int(10 ** chosen.uniform(2, 7)), embedding_dim=dim,
            feature_names=[f"f{i}"],
        )
        for i in range(count)
    ]  # fmt: skip


def compressed(tables):
    """The large ones of `tables` as CCE tables."""
    return [
        CCEEmbeddingBagConfig(
            name=t.name, num_embeddings=t.num_embeddings, embedding_dim=t.embedding_dim,
            feature_names=t.feature_names, num_rows=t.num_embeddings // 400,
        )
        if t.num_embeddings > 20_000
        else t
        for t in tables
    ]  # fmt: skip


def plan(collection, world_size, constraints=None):
    apply_optimizer_in_backward(
        torchrec.optim.RowWiseAdagrad, list(collection.parameters()), {"lr": 0.1}
    )
    planner = EmbeddingShardingPlanner(
        topology=Topology(world_size=world_size, compute_device="cpu"),
        constraints=constraints,
        stats=[],
    )
    sharders = get_default_sharders()
    return planner.plan(nn.ModuleDict({"sparse": collection}), sharders).plan["sparse"]


def kinds(found):
    return Counter((entry.sharding_type, entry.compute_kernel) for entry in found.values())


@pytest.mark.parametrize(
    ("count", "dim", "world_size"), [(26, 16, 2), (26, 16, 8), (26, 64, 2), (6, 16, 2), (40, 32, 4)]
)
def test_its_plan_is_that_of_a_plain_collection_on_cpus(count, dim, world_size):
    """Which has no ROW_WISE on CPUs; for codes it is a detour."""
    tables = plain(count, dim)
    theirs = plan(EmbeddingBagCollection(tables=tables, device=torch.device("meta")), world_size)
    ours = plan(CCEEmbeddingBagCollection(compressed(tables), device="meta"), world_size)
    assert kinds(ours) == kinds(theirs)


def test_our_planner_cuts_the_tables_that_it_is_told_to():
    """It offers ROW_WISE to its own search, and leaves the sharders as they were."""
    tables = compressed(plain(6, 16))
    sharders = get_default_sharders()
    model = nn.ModuleDict({"sparse": CCEEmbeddingBagCollection(tables, device="meta")})
    found = make_planner(tables, 2, CPU, row_wise=["t1", "t2"]).plan(model, sharders).plan
    cut = {n for n, entry in found["sparse"].items() if entry.sharding_type == "row_wise"}
    assert cut == {"t1", "t2"}
    assert "row_wise" not in sharders[0].sharding_types("cpu")
    assert "row_wise" in sharders[0].sharding_types("cuda")


def test_row_wise_by_a_constraint_on_a_cpu_is_refused_with_the_table():
    tables = compressed(plain(3, 16))
    with pytest.raises(RuntimeError, match=r"constraints for t0\."):
        plan(
            CCEEmbeddingBagCollection(tables, device="meta"),
            2,
            {"t0": ParameterConstraints(sharding_types=["row_wise"])},
        )
