"""Calls that would do nothing raise, or say by name what they leave as it is."""

import logging
from dataclasses import replace

import pytest
import torch
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingCollection
from torchrec.inference.modules import quantize_embeddings
from torchrec.modules.embedding_configs import EmbeddingConfig

from cce_torchrec import (
    CCEEmbeddingBagCollection,
    CCEEmbeddingBagConfig,
    ClusteringSchedule,
    compress_model,
)
from cce_torchrec.checkpoint import load_checkpoint, save_checkpoint
from cce_torchrec.clustering import cluster
from cce_torchrec.planning import make_plan, make_planner
from cce_torchrec.train import options
from tests.support.models import SGD, SUM, Model, Net, batch, tables, with_optimizer


def warnings_of(caplog):
    return [r.getMessage() for r in caplog.records if r.name.startswith("cce_torchrec")]


@pytest.mark.parametrize(
    ("config", "larger"),
    [
        (dict(num_embeddings=3, num_rows=8192, num_helper_rows=8192), True),
        (dict(num_embeddings=100, num_rows=30), True),
        (dict(num_embeddings=10_000, num_rows=30, track_seen=True), False),
        (dict(num_embeddings=100, num_rows=100, num_helper_rows=0, learned_codes=False), False),
    ],
)
def test_a_table_that_is_larger_than_the_full_one_is_named(config, larger, caplog):
    made = CCEEmbeddingBagConfig(name="user", embedding_dim=16, feature_names=["f"], **config)
    CCEEmbeddingBagCollection([made])
    told = warnings_of(caplog)
    assert len(told) == larger
    if larger:
        assert f"'user' takes {made.table_bytes:,} bytes" in told[0]
        assert f"{64 * made.num_embeddings:,} as a plain table" in told[0]


@pytest.mark.parametrize("make", [lambda m: Model(m), lambda m: m])
def test_quantisation_by_the_names_of_cce_tables_is_refused(make):
    model = make(Net(tables(SUM)).collection)
    with pytest.raises(ValueError, match=r"names table 't'.*\['t#0', 't#1', 't#2', 't#3'\]"):
        quantize_embeddings(
            model, torch.qint8, inplace=True, per_table_weight_dtype={"t": torch.float16}
        )
    model(batch(0, False))  # unchanged, and may be quantised after all
    dtypes = {"t#0": torch.float16, "p": torch.float16}
    quantised = quantize_embeddings(
        model, torch.qint8, inplace=False, per_table_weight_dtype=dtypes
    )
    inner = getattr(quantised, "collection", quantised).embedding_bag_collection
    found = {c.name: c.data_type.value for c in inner.embedding_bag_configs()}
    assert [found[name] for name in ("t#0", "t#1", "p", "u#0")] == ["FP16", "INT8", "FP16", "INT8"]


def sequence(name):
    config = EmbeddingConfig(
        name=name, num_embeddings=50_000, embedding_dim=32, feature_names=[name]
    )
    return EmbeddingCollection(tables=[config])


def bags(**kwargs):
    shape = dict(num_embeddings=50_000, embedding_dim=32, feature_names=["f"], name="user")
    return EmbeddingBagCollection(tables=[EmbeddingBagConfig(**{**shape, **kwargs})])


@pytest.mark.parametrize(
    ("shape", "why"),
    [
        (dict(embedding_dim=30), "embedding_dim 30 is not a multiple of 4"),
        (dict(num_embeddings=20), "compressed it would take"),
    ],
)
def test_compress_model_that_compresses_nothing_says_so(shape, why, caplog):
    model = torch.nn.ModuleDict({"bags": bags(**shape)})
    compress_model(model, tables=["user"], num_rows=100, verbose=False)
    (told,) = warnings_of(caplog)
    assert "nothing was compressed" in told and "bags.user" in told and why in told


@pytest.mark.parametrize(
    "make",
    [
        lambda: ClusteringSchedule(steps=frozenset({0, 5})),
        lambda: ClusteringSchedule(steps=frozenset({-3})),
        lambda: ClusteringSchedule(interval=-1),
        lambda: ClusteringSchedule.at_epochs([], 10),
        lambda: ClusteringSchedule.evenly(10, 3, until=0.01),
    ],
)
def test_a_schedule_that_is_never_due_is_refused(make):
    with pytest.raises(ValueError, match=r"from 1|use never"):
        make()
    assert not ClusteringSchedule.never().due(1)


def test_no_warnings_where_there_is_nothing_to_say(caplog):
    with caplog.at_level(logging.WARNING):
        CCEEmbeddingBagCollection(tables(SUM)[1:2])
    assert warnings_of(caplog) == []


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--method", "ce", "--clusterings", "3"], "--clusterings: --method ce has nothing to"),
        (["--method", "full", "--finalize"], "--finalize: --method full has nothing to"),
        (["--method", "ce", "--clustering-memory", "9"], "--clustering-memory: --method ce has"),
        (["--finalize", "--clusterings", "0"], "--finalize: nothing is clustered"),
        (["--clustering-memory", "9", "--clusterings", "0"], "memory: nothing is clustered"),
        (["--async-checkpoints"], "no checkpoint is due: --checkpoint-every"),
    ],
)
def test_options_that_a_run_would_ignore_are_refused(given, told, capsys):
    with pytest.raises(SystemExit):
        options.parse(given)
    assert told in capsys.readouterr().err.splitlines()[-1]
    options.parse(["--method", "ce", "--clusterings", "0"])


def test_no_table_at_all_is_refused(tmp_path):
    model = Net(tables(SUM))
    save_checkpoint(tmp_path, model, step=1)
    plain = torch.nn.ModuleDict({"bags": bags()})
    for call in (
        lambda: load_checkpoint(tmp_path, model, tables=[]),
        lambda: compress_model(plain, tables=[], compression=50),
    ):
        with pytest.raises(ValueError, match=r"tables=\[\] names no table"):
            call()


def test_names_that_a_plan_would_ignore_are_refused():
    configs, cpu = tables(SUM), torch.device("cpu")
    with pytest.raises(ValueError, match=r"tables \['t'\] are in data_parallel and in row_wise"):
        make_planner(configs, 2, cpu, data_parallel=["t"], row_wise=["t", "u"])
    model = Net(configs[:2])
    with pytest.raises(ValueError, match=r"names \['u'\], of which the model has no parameters"):
        make_plan(model, configs, cpu, data_parallel=["u"])
    hashed = [replace(configs[0], num_helper_rows=0, learned_codes=False)]
    with pytest.raises(ValueError, match=r"row_wise names \['t'\], which have no codes to spread"):
        make_planner(hashed, 2, cpu, row_wise=["t"])


@pytest.mark.parametrize("in_backward", [False, True])
def test_an_optimizer_of_others_is_refused_by_a_clustering_step(in_backward):
    """The state of the one that trains the table would be left as it is."""
    model = Net(tables(SUM))
    if in_backward:
        with_optimizer(model.collection, SGD)
    dense = torch.optim.Adam(model.over.parameters())
    if in_backward:
        assert cluster(model, optimizer=dense).chunks
        return
    with pytest.raises(ValueError, match="table 't' is unsharded and the optimizer does not hold"):
        cluster(model, optimizer=dense)
    assert cluster(model).chunks
    of_u = torch.optim.Adam(p for name, p in model.named_parameters() if ".u#" in name)
    assert cluster(model, optimizer=of_u, tables=["u"]).chunks
