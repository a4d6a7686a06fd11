"""The health of a live model is that of its checkpoint, and what loops over its ids give."""

from __future__ import annotations

import copy
from unittest import mock

import pytest
import torch

from cce_torchrec.checkpoint import health_parts, saved_state
from cce_torchrec.checkpoint.folder import find, read_manifest
from cce_torchrec.checkpoint.health import checkpoint_health, model_health
from cce_torchrec.checkpoint.save import save_checkpoint
from cce_torchrec.checkpoint.saved_state import SavedState
from cce_torchrec.clustering import cluster, finalize
from cce_torchrec.clustering.local_chunks import unsharded_rows
from tests.support.health import assert_chunk, assert_distribution, assert_rows, plain_chunk
from tests.support.jobs import build, small_shards, step
from tests.support.models import BitsNet, RareNet, collection
from tests.support.ranks import on_ranks
from tests.support.twins import copy_state


def saved_health(folder, model, optimizer, done):
    """Of a checkpoint of the model, read in blocks of a few rows."""
    with small_shards(2):
        save_checkpoint(folder, model, step=done, optimizers=[optimizer])
    with (
        mock.patch.object(saved_state, "BLOCK_BYTES", 300),
        mock.patch.object(health_parts, "_BLOCK", 64),
    ):
        path = find(folder)
        manifest = read_manifest(path)
        return checkpoint_health(manifest, SavedState(path, manifest))


def assert_as_by_loops(found, plain):
    """The tables of a health are those of an unsharded twin, looked at row by row."""
    rows = unsharded_rows(plain, None)
    for table, config in zip(found["tables"], plain.embedding_bag_configs(), strict=True):
        assert table["table"] == f"collection.{config.name}"
        if table["kind"] == "plain":
            weight, state = rows[config.name]
            assert_rows(table["rows"], weight.norm(dim=1).tolist())
            sums = state["sum"].view(-1).tolist()
            assert_distribution(table["optimizer"]["state"]["sum"]["values"], sums)
            assert abs(table["untouched"] - sum(s == 0 for s in sums) / len(sums)) < 1e-5
            continue
        codes, ids = plain.codes[config.name], torch.arange(config.num_embeddings)
        mains, helpers = codes.main_rows(ids), codes.helper_rows(ids)
        assert table["clusterings"] == codes.num_clusterings
        state_bytes = 0
        for chunk in range(config.num_chunks):
            weight, state = rows[f"{config.name}#{chunk}"]
            values, k = weight.tolist(), config.num_rows
            hashed = helpers[chunk].tolist() if config.helper_rows else []
            expected = plain_chunk(mains[chunk].tolist(), hashed, values[:k], values[k:])
            assert_chunk(table["chunks"][chunk], expected)
            state_bytes += 4 * len(state["sum"])
        assert table["optimizer"]["bytes"] == state_bytes
        assert table["optimizer"]["kind"] == "RowWiseAdagrad"


@on_ranks(2)
@pytest.mark.parametrize("kind", ["tw", "cw", "rw"])
def test_live_saved_and_by_loops(rank, world_size, kind, tmp_path):
    model, own = build(kind, seed=1)
    plain = collection(copy.deepcopy(model.module.collection.embedding_bag_configs()))
    for done, change in enumerate((None, cluster, finalize)):
        step(model, own, done)
        if change is not None:
            copy_state(model.module.collection, plain)
            change(model)
            change(plain)
        copy_state(model.module.collection, plain)
        found = model_health(model, [own], step=done)
        assert found == saved_health(tmp_path / "run", model, own, done)
        assert_as_by_loops(found, plain)
    assert {t["num_helper_rows"] for t in found["tables"] if t["kind"] == "CCE"} == {0}


@on_ranks(2)
@pytest.mark.parametrize(("kind", "net"), [("dp", BitsNet), ("cw", BitsNet), ("rw", RareNet)])
def test_codes_of_few_bits_and_copies_on_all_ranks(rank, world_size, kind, net, tmp_path):
    model, own = build(kind, seed=1, net=net)
    step(model, own, 0)
    cluster(model, optimizer=own)
    found = model_health(model, [own], step=1)
    assert found == saved_health(tmp_path / "run", model, own, 1)
    assert all(chunk["ids"] == table["num_embeddings"]
               for table in found["tables"] for chunk in table.get("chunks", []))  # fmt: skip


@on_ranks(2)
def test_what_fails_on_one_rank_fails_on_all(rank, world_size):
    model, own = build("tw", seed=1)
    broken = mock.Mock(side_effect=ValueError("no room")) if rank else health_parts.RowSums.add
    with (
        mock.patch.object(health_parts.RowSums, "add", broken),
        pytest.raises(ValueError, match="rank 1: no room"),
    ):
        model_health(model, [own])
