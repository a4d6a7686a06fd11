"""Tables that fit a memory budget, and plans that do not fit the model."""

import pytest
import torch
import torchrec
from torch import nn
from torchrec.distributed.planner.types import PlannerError
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from cce_torchrec import CCEEmbeddingBagCollection, CCEEmbeddingBagConfig
from cce_torchrec.distributed.sharders import get_default_sharders
from cce_torchrec.planning import make_planner, plan_report, tables_for_memory

CPU = torch.device("cpu")


def full():
    return [
        EmbeddingBagConfig(name=name, num_embeddings=n, embedding_dim=32, feature_names=[name])
        for name, n in (("t", 2_000_000), ("u", 1_000_000), ("v", 400_000), ("p", 100))
    ]


def planned(configs, world_size, memory):
    made = CCEEmbeddingBagCollection(configs, device="meta")
    apply_optimizer_in_backward(torch.optim.Adagrad, list(made.parameters()), {"lr": 0.1})
    model = nn.ModuleDict({"sparse": made})
    planner = make_planner(configs, world_size, CPU, "tw", batch_size=2, memory_bytes=memory)
    return model, planner.plan(model, get_default_sharders())


@pytest.mark.parametrize(("world_size", "memory"), [(1, 60 << 20), (2, 60 << 20)])
def test_tables_for_memory_fill_the_ranks(world_size, memory):
    """The plan fits, and does not with rows for a tenth more memory."""
    settings = dict(kind="tw", batch_size=2, optimizer=torch.optim.Adagrad)
    made = tables_for_memory(full(), memory, world_size, **settings)
    assert not isinstance(made[3], CCEEmbeddingBagConfig)
    assert all(isinstance(table, CCEEmbeddingBagConfig) for table in made[:3])
    model, plan = planned(made, world_size, memory)
    report = plan_report(model, plan, world_size)
    assert max(report.rank_bytes(r) for r in range(world_size)) <= memory
    larger = tables_for_memory(full(), memory * 11 // 10, world_size, **settings)
    with pytest.raises(PlannerError):
        planned(larger, world_size, memory)
    rare = tables_for_memory(full(), memory, world_size, examples_per_id={"t": 2.0}, **settings)
    assert [table.num_chunks for table in rare[:3]] == [8, 4, 4]


@pytest.mark.parametrize("dim", [16, 64])
@pytest.mark.parametrize("optimizer", [torchrec.optim.RowWiseAdagrad, torch.optim.Adagrad])
def test_a_share_of_the_memory_is_left(dim, optimizer):
    """On a CPU too, and with spread chunks, each of which has row-wise state of its own."""
    memory, table = 24 << 20, dict(num_embeddings=1_000_000, embedding_dim=dim)
    full = [EmbeddingBagConfig(name="t", feature_names=["t"], **table)]
    settings = dict(kind="cw", batch_size=2)
    made = tables_for_memory(full, memory, 2, optimizer=optimizer, **settings)
    collection = CCEEmbeddingBagCollection(made, device="meta")
    apply_optimizer_in_backward(optimizer, list(collection.parameters()), {"lr": 0.1})
    model = nn.ModuleDict({"sparse": collection})
    plan = make_planner(made, 2, CPU, memory_bytes=memory, **settings).plan(
        model, get_default_sharders()
    )
    used = [plan_report(model, plan, 2).rank_bytes(rank) for rank in (0, 1)]
    assert 0.75 * memory < max(used) <= 0.85 * memory


def test_tables_stay_full_where_they_fit():
    tables = full()
    assert tables_for_memory(tables, 4 << 30, 2, batch_size=2) == tables


def test_tables_that_are_compressed_already_stay_as_they_are():
    made = CCEEmbeddingBagConfig(
        **dict(name="c", num_embeddings=2_000_000, embedding_dim=32, feature_names=["c"]),
        **dict(num_rows=64, hash_ids=True, seed=7),
    )
    found = tables_for_memory([*full(), made], 80 << 20, 1, batch_size=2)
    assert found[4] is made and isinstance(found[0], CCEEmbeddingBagConfig)


@pytest.mark.parametrize(
    ("tables", "chunks", "told"),
    [
        ([], 4, "0 tables, world_size 1: at least 1 of each"),
        (full(), 0, "num_chunks 0 must be 1 or more"),
    ],
)
def test_nothing_to_choose_from(tables, chunks, told):
    with pytest.raises(ValueError, match="world_size 0: at least 1 of each"):
        tables_for_memory(full(), 1 << 30, 0)
    with pytest.raises(ValueError, match="memory_bytes nan is no finite number of 0 or more"):
        tables_for_memory(full(), float("nan"), 1)
    with pytest.raises(ValueError, match="min_bytes None is no finite number"):
        tables_for_memory(full(), 1 << 30, 1, min_bytes=None)
    with pytest.raises(ValueError, match=told):
        tables_for_memory(tables, 1 << 30, 1, num_chunks=chunks)


def test_too_little_memory():
    with pytest.raises(ValueError, match="do not hold 4 tables with two rows a chunk"):
        tables_for_memory(full(), 1000, 1, batch_size=2)


def test_plan_of_another_model_or_world_size():
    model, plan = planned(full()[2:], 2, 1 << 30)
    with pytest.raises(ValueError, match="puts it on rank 1 of 1; make the plan for this number"):
        plan_report(model, plan, 1)
    with pytest.raises(ValueError, match="the plan has no entry for 'other'"):
        plan_report(nn.ModuleDict({"other": model["sparse"]}), plan, 2)


def test_a_data_parallel_table_is_on_every_rank():
    config = CCEEmbeddingBagConfig(
        name="t", num_embeddings=1000, embedding_dim=16, feature_names=["t"], num_rows=5
    )
    model = nn.ModuleDict({"sparse": CCEEmbeddingBagCollection([config], device="meta")})
    planner = make_planner(
        [config], 2, CPU, "tw", batch_size=2, memory_bytes=1 << 30, data_parallel=["t"]
    )
    report = plan_report(model, planner.plan(model, get_default_sharders()), 2)
    assert [table.rank for table in report.tables] == [0, 1]
    assert {table.bytes for table in report.tables} == {config.table_bytes}
