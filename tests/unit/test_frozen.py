"""Frozen tables of unsharded models stay as they are, and tables= clusters those alone."""

import copy
import logging

import pytest
import torch
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper

from cce_torchrec import CCEEmbeddingBagConfig, CCEEmbeddingCollection
from cce_torchrec.clustering import cluster, finalize
from tests.support.models import ROWWISE, SUM, Model, Net, tables, with_optimizer


def net():
    torch.manual_seed(0)
    return Net(tables(SUM))


def weights_of(model, table):
    return [p for name, p in model.named_parameters() if f".{table}#" in name]


def without_gradient(model):
    with_optimizer(model.collection, ROWWISE)
    for p in weights_of(model, "t"):
        p.requires_grad_(False)


def at_rate_zero(model):
    for table, lr in (("t", 0.0), ("u", 0.1)):
        apply_optimizer_in_backward(torch.optim.SGD, weights_of(model, table), {"lr": lr})


def at_a_later_rate_of_zero(model):
    with_optimizer(model.collection, ROWWISE)
    for p in weights_of(model, "t"):
        p._in_backward_optimizers[0].param_groups[0]["lr"] = torch.tensor(0.0)


def in_a_group_of_rate_zero(model):
    groups = [
        {"params": weights_of(model, "t"), "lr": 0.0},
        {"params": weights_of(model, "u"), "lr": 0.1},
    ]
    return torch.optim.Adagrad(groups)


def in_a_combined_one(model):
    named = {
        table: KeyedOptimizerWrapper(
            {p_name: p for p_name, p in model.named_parameters() if f".{table}#" in p_name},
            lambda p, lr=lr: torch.optim.SGD(p, lr=lr),
        )
        for table, lr in (("t", 0.0), ("u", 0.1))
    }
    return CombinedOptimizer(list(named.items()))


FREEZE = [
    without_gradient, at_rate_zero, at_a_later_rate_of_zero, in_a_group_of_rate_zero,
    in_a_combined_one,
]  # fmt: skip


def state_of(model, table):
    found = {k: v for k, v in model.state_dict().items() if f".{table}" in k}
    assert found
    return copy.deepcopy(found)


def same(before, after):
    return before.keys() == after.keys() and all(
        torch.equal(before[key], after[key]) for key in before
    )


@pytest.mark.parametrize("freeze", FREEZE)
@pytest.mark.parametrize("call", [cluster, finalize])
def test_a_frozen_table_stays_as_it_is(freeze, call):
    model = net()
    optimizer = freeze(model)
    before, other = state_of(model, "t"), state_of(model, "u")
    report = call(model, optimizer=optimizer)
    assert same(before, state_of(model, "t")) and not same(other, state_of(model, "u"))
    assert {chunk.table for chunk in report.chunks} == {"collection.u"}
    assert list(report.left_alone) == ["collection.t"]
    assert report.left_alone["collection.t"].startswith("frozen: ")
    assert model.collection.embedding_bag_configs()[0].helper_rows == 15


def test_tables_clusters_those_alone():
    for names in (["t"], ["collection.t"], ("t",)):
        model = net()
        before, other = state_of(model, "t"), state_of(model, "u")
        report = cluster(model, tables=names)
        assert not same(before, state_of(model, "t")) and same(other, state_of(model, "u"))
        assert report.left_alone == {"collection.u": "not among tables"}
    finalize(model, tables=["u"])
    assert [c.helper_rows for c in model.collection.embedding_bag_configs()[::2]] == [15, 0]


def test_a_broken_table_that_is_not_wanted_or_frozen_does_no_harm():
    model = net()
    with torch.no_grad():
        weights_of(model, "t")[0][0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        cluster(model)
    assert cluster(model, tables=["u"]).chunks
    without_gradient(model)
    assert cluster(model).chunks


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["users"], r"tables: no table 'users'.*did you mean 'user'"),
        (["collection.usr"], "did you mean 'collection.user'"),
        (["p"], r"no table 'p'; the model has \['collection.t', 'collection.user'\]"),
        ("user", r"tables='user' is one name; give a list, \['user'\]"),
        ([], r"tables=\[\] names no table"),
        (["t"], "table 'collection.t': frozen: its parameters require no gradient; it cannot"),
    ],
)
def test_names_that_cannot_be_clustered_are_refused(names, told):
    configs = tables(SUM)
    configs[2].name = "user"
    model = Net(configs)
    for p in weights_of(model, "t"):
        p.requires_grad_(False)
    with pytest.raises(ValueError, match=told):
        cluster(model, tables=names)


def test_a_table_that_is_frozen_in_part_is_refused():
    model = net()
    weights_of(model, "t")[1].requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"'collection.t' is frozen.*freeze all of its chunks"):
        cluster(model)
    assert same(before, model.state_dict())


@pytest.mark.parametrize("call", [cluster, finalize])
@pytest.mark.parametrize(
    "model",
    [
        torch.nn.Linear(2, 2),
        EmbeddingBagCollection(
            tables=[
                EmbeddingBagConfig(name="p", num_embeddings=9, embedding_dim=4, feature_names=["f"])
            ]
        ),
        Model(torch.nn.Sequential()),
    ],
)
def test_a_model_without_cce_tables_is_refused(call, model):
    with pytest.raises(ValueError, match=r"no CCE table to cluster.*compress_model"):
        call(model)


def hashed():
    return Net(
        [
            CCEEmbeddingBagConfig(
                name="hashed", num_embeddings=30, embedding_dim=8, feature_names=["f"],
                num_chunks=1, num_rows=4, num_helper_rows=0, learned_codes=False,
            )
        ]
    )  # fmt: skip


def finalized():
    model = net()
    finalize(model)
    return model


def all_frozen():
    return net().requires_grad_(False)


def sequence_without_helper():
    config = CCEEmbeddingBagConfig(
        name="s", num_embeddings=30, embedding_dim=16, feature_names=["f"], num_rows=4,
        num_helper_rows=0,
    )  # fmt: skip
    return CCEEmbeddingCollection([config])


LEFT = [(hashed, "are a hash"), (finalized, "no helper"), (all_frozen, "frozen"),
        (sequence_without_helper, "no helper")]  # fmt: skip


@pytest.mark.parametrize(("make", "why"), LEFT)
def test_a_call_that_finds_nothing_to_do_says_so_once(make, why, caplog):
    from cce_torchrec.clustering import choice

    choice._say_once.cache_clear()
    model = make()
    with caplog.at_level(logging.WARNING, "cce_torchrec.clustering"):
        for _ in range(2):
            report = cluster(model)
            assert not report.chunks and all(why in reason for reason in report.left_alone.values())
    told = [r.message for r in caplog.records if "nothing was clustered" in r.message]
    assert len(told) == 1 and all(path in told[0] for path in report.left_alone)
