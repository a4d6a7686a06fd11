"""load_checkpoint(strict=False): what matches is loaded, and the report tells the rest."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from cce_torchrec import CCEEmbeddingBagConfig
from cce_torchrec.checkpoint import load_checkpoint, save_checkpoint
from cce_torchrec.checkpoint.optimizers import optimizer_states
from cce_torchrec.clustering import cluster
from tests.support.jobs import assert_same_outputs, build, outputs, step
from tests.support.models import SUM, Net, batch, tables
from tests.support.ranks import on_ranks

T, P, U = tables(SUM)
LARGER = replace(P, num_embeddings=90)
MORE = CCEEmbeddingBagConfig(
    name="more", num_embeddings=70, embedding_dim=16, feature_names=["g"], num_rows=4, pooling=SUM
)


class OtherNet(Net):
    """A wider dense layer, and one more."""

    def __init__(self, configs):
        super().__init__(configs)
        self.over_more = nn.Linear(2, 2)

    def forward(self, kjt):
        return self.over_more(super().forward(kjt))


def save(folder, kind, configs=None, clusters=True):
    model, dense = build(kind, seed=0, configs=configs)
    step(model, dense, 1)
    if clusters:
        cluster(model, optimizer=dense if kind == "dp" else None)
    save_checkpoint(folder, model, step=1, optimizers=[dense])
    return model, dense


def of_features(model, names):
    with torch.no_grad():
        inner = getattr(model, "module", model).collection
        found = inner(batch(3, False))
        found = found.wait() if hasattr(found, "wait") else found
    return [found[name].numpy().copy() for name in names]


def weight_and_state(model, dense, table):
    """The parameter of a plain table on this rank, and its optimizer's state, with their rows."""
    out = {}
    states = optimizer_states(model, [dense])
    named = {key: value for key, value in model.state_dict().items() if f".{table}." in key}
    for name, state in states.items():
        if f".{table}." in name:
            named |= {f"{name}.{key}": value for key, value in state.tensors.items()}
    for name, value in named.items():
        shards = value.local_shards() if hasattr(value, "local_shards") else []
        for shard in shards:
            out[name, shard.metadata.shard_offsets[0]] = shard.tensor.detach().clone()
        if not hasattr(value, "local_shards"):
            out[name, 0] = value.detach().clone()
    return out


@on_ranks(2)
@pytest.mark.parametrize(
    ("kind", "other_kind"), [("cw", "tw"), ("tw", "rw"), ("dp", "dp"), ("rw", "unsharded")]
)
def test_other_features_and_another_network(rank, world_size, kind, other_kind, tmp_path):
    """A table more, one less, a larger plain one, and other dense layers."""
    save(tmp_path, kind)
    model, dense = build(other_kind, seed=4, configs=[T, LARGER, MORE], net=OtherNet)
    report = load_checkpoint(tmp_path, model, optimizers=[dense], strict=False)
    assert report.tables == ["collection.p", "collection.t"]
    assert report.loaded == ["collection.p", "collection.t", "over.bias"]
    assert report.grown == ["collection.p"]
    assert report.new == ["collection.more", "over_more.bias", "over_more.weight"]
    assert report.missing == ["collection.u"]
    assert report.conflicts == {
        "over.weight": "shape [2, 56] in the checkpoint, [2, 64] in the model"
    }
    expected, _ = build("unsharded", seed=9)
    load_checkpoint(tmp_path, expected)
    names = ["f@t", "f@p"]
    for a, b in zip(of_features(model, names), of_features(expected, names), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    step(model, dense, 2)  # and it trains on


@on_ranks(2)
@pytest.mark.parametrize("kind", ["tw", "rw", "cw", "dp", "unsharded"])
def test_a_plain_table_grows(rank, world_size, kind, tmp_path):
    """New rows and their optimizer state are the model's own; old ones are saved ones."""
    saved_model, saved_dense = save(tmp_path, kind, [T, P, U])
    model, dense = build(kind, seed=4, configs=[T, LARGER, U])
    before = weight_and_state(model, dense, "p")
    report = load_checkpoint(tmp_path, model, optimizers=[dense], grow=["p"])
    assert (report.grown, report.dropped) == (["collection.p"], [])
    assert_same_outputs(model, outputs(saved_model))  # ids of the batches are below 40
    after = weight_and_state(model, dense, "p")
    if kind in ("tw", "dp", "unsharded"):  # whose rows are all in one place
        for at, value in weight_and_state(saved_model, saved_dense, "p").items():
            assert torch.equal(after[at][:40] if value.dim() else after[at], value), at
    for (name, first), value in after.items():
        if value.dim() and len(value) > 1:
            new = value[max(40 - first, 0) :]
            there = before.get((name, first))
            assert torch.equal(new, torch.zeros_like(new) if there is None else there[-len(new) :])
    step(model, dense, 2)


@pytest.mark.parametrize("folder", ["", "memory://warm"])
def test_what_differs_is_told_with_both_shapes(folder, tmp_path):
    model, dense = build("unsharded", seed=0)
    step(model, dense, 1)
    save_checkpoint(folder or tmp_path, model, step=1, optimizers=[dense])
    plain = EmbeddingBagConfig(
        name="u", num_embeddings=1000, embedding_dim=8, feature_names=["h"], pooling=SUM
    )
    wide = replace(T, num_chunks=2)
    other, its = build("unsharded", 1, configs=[wide, replace(P, num_embeddings=30), plain, MORE])
    before = {key: value.clone() for key, value in other.collection.state_dict().items()}
    report = load_checkpoint(folder or tmp_path, other, optimizers=[its], strict=False)
    assert report.conflicts == {
        "collection.p": "shape [40, 8] in the checkpoint, [30, 8] in the model",
        "collection.t": "shape [300, 16] in the checkpoint, [300, 16] in the model; num_chunks 4 "
        "in the checkpoint, 2 in the model",
        "collection.u": "shape [1000, 8] in the checkpoint, [1000, 8] in the model; a CCE table in "
        "the checkpoint, a plain one here",
        "over.weight": "shape [2, 56] in the checkpoint, [2, 72] in the model",
    }
    assert report.loaded == ["over.bias"] and report.new == ["collection.more"]
    for key, value in other.collection.state_dict().items():
        assert torch.equal(value, before[key]), key
    step(other, its, 2)


@on_ranks(2)
def test_a_checkpoint_of_which_nothing_matches(rank, world_size, tmp_path):
    save_checkpoint(tmp_path, nn.ModuleDict({"tower": nn.Linear(2, 2)}), step=1)
    model, dense = build("tw", 0)
    before = outputs(model)
    with pytest.raises(ValueError, match=r"another model.* \[tower.bias, tower.weight\] .* lacks"):
        load_checkpoint(tmp_path, model, optimizers=[dense], strict=False)
    assert_same_outputs(model, before)


@pytest.mark.parametrize("table", ["t", "p"])
def test_growth_that_shrinks_is_refused(table, tmp_path):
    model, _ = build("unsharded", 0)
    save_checkpoint(tmp_path, model, step=1)
    smaller = [replace(c, num_embeddings=30) if c.name == table else c for c in (T, P, U)]
    other, _ = build("unsharded", 0, configs=smaller)
    there = 300 if table == "t" else 40
    with pytest.raises(ValueError, match=f"num_embeddings is {there} in the checkpoint, 30 in"):
        load_checkpoint(tmp_path, other, grow=[table])


def test_a_load_for_evaluation_gives_one_warning(tmp_path, caplog):
    """Of the state of all optimizers, which the model does not have."""
    model, dense = build("unsharded", 0)
    step(model, dense, 1)
    save_checkpoint(tmp_path, model, step=1, optimizers=[dense])
    with caplog.at_level("WARNING", logger="cce_torchrec"):
        report = load_checkpoint(tmp_path, Net(Net.configs()))
    (warning,) = [r.getMessage() for r in caplog.records if "checkpoint" in r.name]
    assert len(report.dropped) == 5 and "and 2 more, which report.dropped has" in warning
