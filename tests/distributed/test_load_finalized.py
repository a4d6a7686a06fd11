"""A finalized checkpoint into the model as it was built at the start."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from cce_torchrec import checkpoint_info, compress_model, finalize
from cce_torchrec.checkpoint import load_checkpoint, save_checkpoint
from tests.distributed.test_checkpoint import assert_same_state
from tests.support.jobs import assert_same_outputs, build, outputs, step
from tests.support.models import SUM, Model, Net, SequenceNet, tables
from tests.support.ranks import on_ranks


def saved(folder, kind, net=Net):
    """A job that took a step, was finalized, and saved."""
    model, dense = build(kind, seed=0, net=net)
    step(model, dense, 1)
    finalize(model, optimizer=dense if kind == "dp" else None)
    save_checkpoint(folder, model, step=1, optimizers=[dense])
    return model, dense


@on_ranks(2)
@pytest.mark.parametrize(
    ("kind", "other_kind", "net"),
    [("cw", "cw", Net), ("tw", "rw", Net), ("rw", "cw", Net), ("cw", "tw", SequenceNet)],
)  # fmt: skip
def test_the_model_becomes_finalized(rank, world_size, kind, other_kind, net, tmp_path):
    """Outputs, state of the optimizers where the plan is the same, and what trains on from them."""
    model, dense = saved(tmp_path, kind, net)
    other, its = build(other_kind, seed=5 + rank, net=net)
    report = load_checkpoint(tmp_path, other, optimizers=[its])
    assert (report.finalized, report.dropped) == (["collection.t", "collection.u"], [])
    assert_same_outputs(other, outputs(model))
    if kind == other_kind:
        assert_same_state([(model, dense), (other, its)])
    for m, d in ((model, dense), (other, its)):
        step(m, d, 2)
    for a, b in zip(outputs(model), outputs(other), strict=True):
        torch.testing.assert_close(torch.from_numpy(a), torch.from_numpy(b), rtol=1e-4, atol=1e-5)


@on_ranks(2)
def test_data_parallel_and_unsharded_models_too(rank, world_size, tmp_path):
    model, _ = saved(tmp_path, "dp")
    for kind in ("dp", "unsharded"):
        other, its = build(kind, seed=3)
        assert load_checkpoint(tmp_path, other, optimizers=[its]).finalized
        assert_same_outputs(other, outputs(model))
    assert not load_checkpoint(tmp_path, other, optimizers=[its]).finalized  # it is by now


def test_one_table_alone(tmp_path):
    model, dense = build("unsharded", seed=0)
    finalize(model, tables=["t"])
    save_checkpoint(tmp_path, model, step=1, optimizers=[dense])
    other, _ = build("unsharded", seed=1)
    assert load_checkpoint(tmp_path, other, tables=["u", "p"]).finalized == []
    assert load_checkpoint(tmp_path, other, tables=["t"]).finalized == ["collection.t"]
    assert_same_collections(model, other)


def assert_same_collections(model, other):
    """Codebooks and codes, bit for bit."""
    found = other.collection.state_dict()
    for key, value in model.collection.state_dict().items():
        assert torch.equal(value, found[key]), key


def test_a_model_of_compress_model(tmp_path):
    def compressed():
        plain = EmbeddingBagConfig(
            name="t", num_embeddings=9000, embedding_dim=16, feature_names=["f"], pooling=SUM
        )
        model = Model(EmbeddingBagCollection(tables=[plain]))
        compress_model(model, num_rows=100, tables=["t"], verbose=False)
        return model

    model, other = compressed(), compressed()
    finalize(model)
    save_checkpoint(tmp_path, model, step=1)
    assert load_checkpoint(tmp_path, other).finalized == ["collection.t"]
    assert_same_collections(model, other)


@on_ranks(2)
@pytest.mark.parametrize(("rows", "helper"), [(6, 15), (5, 14), (30, 10)])
def test_another_budget_is_refused(rank, world_size, rows, helper, tmp_path):
    """And the model is what it was, also where another table was finalized by then."""
    saved(tmp_path, "cw")
    t, p, u = tables(SUM)
    other, _ = build("cw", 0, configs=[replace(t, num_rows=rows, num_helper_rows=helper), p, u])
    before = outputs(other)
    named = rf"'collection.t': .* num_rows 20, .* num_rows {rows} and num_helper_rows {helper}"
    with pytest.raises(ValueError, match=named):
        load_checkpoint(tmp_path, other)
    assert_same_outputs(other, before)
    assert [c.helper_rows for c in other.module.collection.embedding_bag_configs()[::2]] == [
        helper,
        900,
    ]


def test_a_checkpoint_from_before_finalize_is_refused(tmp_path):
    model, _ = build("unsharded", seed=0)
    save_checkpoint(tmp_path, model, step=1)
    finalize(model)
    with pytest.raises(ValueError, match="num_rows 20, and the checkpoint has num_rows 5 and num"):
        load_checkpoint(tmp_path, model)


def test_what_a_script_asks_before_it_builds(tmp_path):
    saved(tmp_path, "unsharded")
    info = checkpoint_info(tmp_path)
    assert (info.step, info.extra, info.world_size, info.format) == (1, None, 1, 4)
    assert info.finalized == ["collection.t", "collection.u"]
    assert info.tables["collection.p"].num_embeddings == 40
    assert checkpoint_info(info.path) == info
    with pytest.raises(ValueError, match="no checkpoint in"):
        checkpoint_info(tmp_path / "none")
