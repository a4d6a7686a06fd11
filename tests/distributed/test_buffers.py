"""Sharded lookups read the buffers, and the tensors of a state dict are those buffers."""

from __future__ import annotations

import pytest
import torch
import torch.distributed.checkpoint as dcp

from cce_torchrec.clustering import cluster
from tests.distributed.test_pipeline import build
from tests.support.models import Batch, batch
from tests.support.ranks import on_ranks


def seen_by(model, rank):
    with torch.no_grad():
        return model(Batch(batch(50 + rank, False)))[1]


def clustered(kind, rank):
    model, _ = build(kind)
    model(Batch(batch(rank, False)))[0].backward()
    cluster(model)
    return model


@on_ranks(1, 2)
@pytest.mark.parametrize("kind", ["tw", "cw", "rw"])
def test_a_state_dict_may_be_loaded_in_place(rank, world_size, kind, tmp_path):
    """By torch.distributed.checkpoint; under cw, where chunks are apart, shards are copies."""
    source, (target, _) = clustered(kind, rank), build(kind)
    seen_by(target, rank)
    dcp.save(source.state_dict(), checkpoint_id=tmp_path)
    state = target.state_dict()
    seen_by(target, rank)  # the state dict may have waited
    dcp.load(state, checkpoint_id=tmp_path)
    assert torch.equal(seen_by(target, rank), seen_by(source, rank))
    del state
    dcp.save(clustered(kind, rank + 1).state_dict(), checkpoint_id=tmp_path / "other")
    dcp.load(target.state_dict(), checkpoint_id=tmp_path / "other")  # given up before it is read
    dcp.save(target.state_dict(), checkpoint_id=tmp_path / "again")
    dcp.load(source.state_dict(), checkpoint_id=tmp_path / "again")
    cluster(target)
    cluster(source)
    assert torch.equal(seen_by(target, rank), seen_by(source, rank))


@on_ranks(2)
def test_a_state_dict_that_is_loaded_takes_the_place_of_what_was_written(
    rank, world_size, tmp_path
):
    first, (target, _) = clustered("cw", rank), build("cw")
    saved = target.state_dict()
    before = seen_by(target, rank)
    dcp.save(first.state_dict(), checkpoint_id=tmp_path)
    dcp.load(target.state_dict(), checkpoint_id=tmp_path)
    fresh, _ = build("cw")
    target.load_state_dict(fresh.state_dict())
    assert torch.equal(seen_by(target, rank), before)
    del saved


@on_ranks(1, 2)
@pytest.mark.parametrize("kind", ["tw", "cw", "rw"])
def test_copied_buffers_are_read(rank, world_size, kind):
    source, (target, _) = clustered(kind, rank), build(kind)
    context = target.module.collection.create_context()
    one = batch(50 + rank, False)
    arrived = target.module.collection.input_dist(context, one).wait().wait()
    with torch.no_grad():
        for part in ("named_parameters", "named_buffers"):
            values = dict(getattr(source, part)())
            for name, value in getattr(target, part)():
                value.copy_(values[name])
    # Also by a batch that was distributed before.
    collection = source.module.collection
    expected = collection(one).wait().values()
    found = target.module.collection.compute_and_output_dist(context, arrived).wait().values()
    assert torch.equal(found, expected)
