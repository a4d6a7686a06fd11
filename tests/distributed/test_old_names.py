"""State dicts of TorchRec's own collections into the plain tables of ours."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from cce_torchrec import CCEEmbeddingBagCollection, CCEEmbeddingBagConfig, CCEEmbeddingCollection
from cce_torchrec.checkpoint import load_checkpoint, save_checkpoint
from tests.support.jobs import build
from tests.support.models import ROWWISE, SUM, Model, Net, SequenceNet, batch, with_optimizer
from tests.support.ranks import on_ranks

P = EmbeddingBagConfig(name="p", num_embeddings=40, embedding_dim=8, feature_names=["h", "f"])
OLD = "collection.embedding_bags.p.weight"
OWN = "collection.embedding_bag_collection.embedding_bags.p.weight"


def old_state():
    return Model(EmbeddingBagCollection(tables=[P])).state_dict()


def test_unsharded_strict_and_not():
    for strict in (True, False):
        model, state = Model(CCEEmbeddingBagCollection([P])), old_state()
        assert list(state) == [OLD]
        model.load_state_dict(state, strict=strict)
        assert torch.equal(model.state_dict()[OWN], state[OLD])
        assert list(state) == [OLD]  # the caller's is as it was


def test_a_collection_that_is_the_model_itself():
    model, state = CCEEmbeddingBagCollection([P]), EmbeddingBagCollection(tables=[P]).state_dict()
    model.load_state_dict(state)
    (found,) = model.state_dict().values()
    assert torch.equal(found, state["embedding_bags.p.weight"])


def test_sequences():
    plain = EmbeddingConfig(name="p", num_embeddings=40, embedding_dim=8, feature_names=["f"])
    model = Model(CCEEmbeddingCollection([plain]))
    state = Model(EmbeddingCollection(tables=[plain])).state_dict()
    model.load_state_dict(state)
    (found,) = model.state_dict().values()
    assert torch.equal(found, state["collection.embeddings.p.weight"])


@on_ranks(2)
@pytest.mark.parametrize(("kind", "net"), [("tw", Net), ("rw", Net), ("tw", SequenceNet)])
def test_sharded(rank, world_size, kind, net):
    """A whole old tensor, by its old name, beside the rest of the state."""
    model, _ = build(kind, 0, net=net)
    twin, _ = build("unsharded", 0, net=net)
    (own,) = [key for key in twin.state_dict() if ".p." in key]
    old = OLD if net is Net else "collection.embeddings.p.weight"
    weight = torch.rand_like(twin.state_dict()[own])
    model.load_state_dict({old: weight}, strict=False)
    loaded = model.state_dict()[own]
    for shard in loaded.local_shards():
        first, rows = shard.metadata.shard_offsets[0], shard.metadata.shard_sizes[0]
        assert torch.equal(shard.tensor, weight[first : first + rows])
    whole = dict(model.state_dict())
    whole[old] = whole.pop(own)
    both = whole | {own: whole[old]}
    model.load_state_dict(whole)  # which TorchRec gives the names that DDP has
    with pytest.raises(ValueError, match=r"table 'p': the state dict has both .* take one of them"):
        model.load_state_dict(both)


@pytest.mark.parametrize("strict", [True, False])
def test_names_that_two_tables_claim(strict):
    model, state = Model(CCEEmbeddingBagCollection([P])), old_state()
    before = model.state_dict()[OWN].clone()
    with pytest.raises(ValueError, match=f"both '{OWN}' and '{OLD}'"):
        model.load_state_dict(state | {OWN: state[OLD] + 1}, strict=strict)
    assert torch.equal(model.state_dict()[OWN], before)


def test_keys_are_parameters_and_buffers():
    compressed = CCEEmbeddingBagConfig(
        name="t", num_embeddings=300, embedding_dim=16, feature_names=["f"], num_rows=5,
        track_seen=True,
    )  # fmt: skip
    for kind in (CCEEmbeddingBagCollection, CCEEmbeddingCollection):
        model = kind([compressed])
        named = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
        assert set(model.state_dict()) == named


@on_ranks(2)
@pytest.mark.parametrize("kind", ["tw", "rw", "unsharded"])
def test_a_checkpoint_of_torchrecs_collections(rank, world_size, kind, tmp_path):
    """Into the plain table of ours with its optimizer state, and back."""
    configs = [replace(P, pooling=SUM)]
    old = with_optimizer(Model(EmbeddingBagCollection(tables=configs)), ROWWISE)
    old(batch(1, False)).values().square().sum().backward()
    save_checkpoint(tmp_path / "old", old, step=1)
    model, _ = build(kind, 3)
    report = load_checkpoint(tmp_path / "old", model, tables=["p"])
    assert (report.tables, report.dropped) == (["collection.p"], [])
    assert load_checkpoint(tmp_path / "old", model, strict=False).tables == ["collection.p"]
    save_checkpoint(tmp_path / "new", model, step=2)
    back = with_optimizer(Model(EmbeddingBagCollection(tables=configs)), ROWWISE)
    report = load_checkpoint(tmp_path / "new", back, tables=["p"])
    assert report.dropped == []
    for one in (old, back):
        one(batch(2, False)).values().square().sum().backward()
    assert torch.equal(old.state_dict()[OLD], back.state_dict()[OLD])
