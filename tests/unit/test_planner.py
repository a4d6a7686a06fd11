"""Plans count codes."""

import pytest
import torch
from torch import nn
from torchrec.distributed.planner.types import PlannerError
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from cce_torchrec import CCEEmbeddingBagCollection, CCEEmbeddingBagConfig
from cce_torchrec.distributed.sharders import get_default_sharders
from cce_torchrec.planning import make_plan, make_planner

CPU = torch.device("cpu")


def model(tables):
    made = CCEEmbeddingBagCollection(tables=tables, device="meta")
    apply_optimizer_in_backward(torch.optim.SGD, list(made.parameters()), {"lr": 0.1})
    return nn.ModuleDict({"sparse": made})


def tables():
    return [
        CCEEmbeddingBagConfig(
            name="t",
            num_embeddings=50_000_000,
            embedding_dim=64,
            feature_names=["f"],
            num_rows=65_536,
        ),
        EmbeddingBagConfig(name="p", num_embeddings=100, embedding_dim=64, feature_names=["g"]),
    ]


@pytest.mark.parametrize("kind", ["tw", "cw", "auto"])
def test_codes_count_against_memory(kind):
    """400 MB of codes beside 67 MB of codebooks; spread, half of them on each of two ranks."""
    configs = tables()
    enough = make_planner(configs, 2, CPU, kind, memory_bytes=1 << 30)
    plan = enough.plan(model(configs), get_default_sharders())
    entry = plan.plan["sparse"]["t"]
    assert entry.compute_kernel == "fused"
    share = len(set(entry.ranks)) if kind == "cw" else 1
    stored = max(
        sum(shard.storage.ddr for shard in option.shards if shard.rank == rank)
        for option in enough._best_plan
        if option.name == "t"
        for rank in range(2)
    )
    expected = configs[0].table_bytes / share
    assert stored == pytest.approx(expected, rel=0.02)
    with pytest.raises(PlannerError):
        little = make_planner(configs, 2, CPU, kind, memory_bytes=150 << 20)
        little.plan(model(configs), get_default_sharders())


def test_tables_are_in_the_memory_of_a_gpu_unless_asked_otherwise():
    configs = [
        CCEEmbeddingBagConfig(
            name="t", num_embeddings=1000, embedding_dim=64, feature_names=["f"], num_rows=200_000
        ),
        EmbeddingBagConfig(name="p", num_embeddings=200_000, embedding_dim=64, feature_names=["g"]),
    ]
    for table in configs:
        made = model([table])

        def plan(memory_bytes, table=table, made=made, **options):
            gpu = torch.device("cuda")
            planner = make_planner(
                [table], 2, gpu, "tw", batch_size=2, memory_bytes=memory_bytes, **options
            )
            return planner.plan(made, get_default_sharders()).plan["sparse"][table.name]

        assert plan(1 << 30).compute_kernel == "fused"
        with pytest.raises(PlannerError):
            plan(32 << 20)
        assert plan(32 << 20, unified_memory=True).compute_kernel.startswith("fused_uvm")


def test_no_warnings(caplog, recwarn):
    configs = tables()
    planner = make_planner(configs, 2, CPU, memory_bytes=1 << 30)
    assert not [warning for warning in recwarn if "StorageReservation" in str(warning.message)]
    planner.plan(model(configs), get_default_sharders())
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_unknown_kind():
    with pytest.raises(ValueError, match="unknown plan 'gs'"):
        make_planner(tables(), 2, CPU, "gs")


def test_codes_too_large_for_one_rank_are_spread_by_ids():
    """400 MB of codes in 4 chunks on 8 ranks: columns need 100 MB on a rank, blocks of ids 50."""
    configs = tables()
    for memory, kind in ((400 << 20, "auto"), (90 << 20, "auto"), (400 << 20, "tw")):
        named = ["t"] if kind == "tw" else []
        planner = make_planner(configs, 8, CPU, kind, memory_bytes=memory, row_wise=named)
        plan = planner.plan(model(configs), get_default_sharders())
        chosen = plan.plan["sparse"]["t"].sharding_type
        assert (chosen == "row_wise") == (memory < 100 << 20 or bool(named))
    with pytest.raises(ValueError, match=r"row_wise names \['x'\]"):
        make_planner(configs, 2, CPU, row_wise=["x"])


def test_data_parallel_tables_cost_every_rank_all_of_their_bytes():
    configs = tables()
    planner = make_planner(configs, 2, CPU, memory_bytes=1 << 30, data_parallel=["t"])
    plan = planner.plan(model(configs), get_default_sharders())
    assert plan.plan["sparse"]["t"].sharding_type == "data_parallel"
    option = next(option for option in planner._best_plan if option.name == "t")
    assert sorted(shard.rank for shard in option.shards) == [0, 1]
    for shard in option.shards:
        assert shard.storage.ddr == pytest.approx(configs[0].table_bytes, rel=0.02)
    with pytest.raises(ValueError, match=r"data_parallel names \['x'\]"):
        make_planner(configs, 2, CPU, data_parallel=["x"])


def test_tables_that_the_caller_leaves_out_are_not_planned_by_chance():
    with pytest.raises(ValueError, match=r"tables \['t'\] are in the model, but not among .*'p'"):
        make_plan(model(tables()), tables()[1:], CPU)
