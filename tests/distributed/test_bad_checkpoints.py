"""Checkpoints that are damaged or do not fit: the same error on every rank, nothing changed."""

from __future__ import annotations

import contextlib
import os
import shutil
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from cce_torchrec.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from cce_torchrec.checkpoint.tensor_files import TensorWriter
from cce_torchrec.clustering import cluster
from cce_torchrec.codes.storage import hashed_codes
from tests.support.jobs import assert_same_outputs, build, outputs, step
from tests.support.models import SUM, batch, tables
from tests.support.ranks import on_ranks


def configs(**changes):
    """The tables of the tests with fields of table t changed."""
    t, p, u = tables(SUM)
    return [replace(t, **changes), p, u]


def damaged(path: Path, how: str) -> None:
    data = sorted(path.glob("rank-*.safetensors"))
    if how == "missing rank file":
        data[-1].unlink()
    elif how == "missing random state":
        (path / "rank-1.json").unlink()
    elif how == "truncated":
        os.truncate(data[0], data[0].stat().st_size // 2)
    elif how == "corrupt":
        content = bytearray(data[0].read_bytes())
        content[len(content) // 2] ^= 1
        data[0].write_bytes(content)
    elif how == "corrupt index":
        (path / "tensors.json").write_bytes(b"\x00" * (path / "tensors.json").stat().st_size)
    elif how == "manifest":
        (path / "manifest.json").write_text('{"format": 1, "ti')
    else:  # a kill in mid-write: the manifest comes last
        (path / "manifest.json").unlink()


DAMAGES = {
    "missing rank file": r"rank-1.safetensors is missing",
    "missing random state": r"rank-1.json is missing",
    "truncated": r"has \d+ bytes, its manifest says \d+",
    "corrupt": r"is damaged \(its checksum differs\)",
    "corrupt index": r"tensors.json is damaged",
    "manifest": r"manifest.json is damaged",
    "mid-write": r"no checkpoint in .* have no manifest.json, and were not finished",
}


def save_good(rank, world_size, folder):
    """A checkpoint of one step and a clustering; what its table t gives is returned."""
    model, dense = build("cw", rank)
    step(model, dense, 1)
    cluster(model)
    save_checkpoint(folder, model, step=1, optimizers=[dense])
    return model.module.collection(batch(3, False))["f@t"].detach().numpy().copy()


def save_seen(rank, world_size, folder):
    """A checkpoint of tables that mark the ids that they saw; codes of t of this rank by chunk."""
    seen, _ = build("cw", rank, configs=configs(track_seen=True))
    seen.train()
    seen(batch(3, False))
    cluster(seen)
    seen(batch(3, False))
    save_checkpoint(folder, seen, step=1)
    own = dict(seen.module.collection.codes.named_children()).get("t")
    if own is None:
        return {}
    return dict(zip(own.chunks, own.unpacked.T.numpy(), strict=True))


@pytest.fixture(scope="module")
def good(rank_pool, tmp_path_factory):
    """The folder that tests copy or read, and what table t of its checkpoint gives."""
    folder = tmp_path_factory.mktemp("good")
    return folder, rank_pool.run(2, save_good, folder)[0]


@pytest.fixture(scope="module")
def seen(rank_pool, tmp_path_factory):
    """The folder, and the codes of table t by chunk."""
    folder = tmp_path_factory.mktemp("seen")
    first, second = rank_pool.run(2, save_seen, folder)
    return folder, first | second


@on_ranks(2)
@pytest.mark.parametrize("how", DAMAGES)
def test_damage_is_refused(rank, world_size, how, good, tmp_path):
    model, dense = build("cw", rank)
    before = outputs(model)
    bad = tmp_path / how
    if rank == 0:
        shutil.copytree(good[0], bad)
        damaged(latest_checkpoint(bad), how)
    dist.barrier()
    with pytest.raises(ValueError, match=DAMAGES[how]):
        load_checkpoint(bad, model, optimizers=[dense])
    assert_same_outputs(model, before)


@on_ranks(2)
def test_a_folder_without_checkpoints(rank, world_size, tmp_path):
    model, _ = build("cw", rank)
    with pytest.raises(ValueError, match="no checkpoint in"):
        load_checkpoint(tmp_path / "nothing", model)


PLAIN = EmbeddingBagConfig(
    name="t", num_embeddings=300, embedding_dim=16, feature_names=["f", "g"], pooling=SUM
)
OTHER_TABLES = {
    "more ids": (
        configs(num_embeddings=301), r"num_embeddings is 300 in the checkpoint, 301 in the mod"
    ),
    "fewer ids": (
        configs(num_embeddings=299), r"num_embeddings is 300 in the checkpoint, 299 in the mod"
    ),
    "chunks": (configs(num_chunks=2), r"num_chunks is 4 in the checkpoint, 2 in the model"),
    "rows": (configs(num_rows=6), r"num_rows is 5 in the checkpoint, 6 in the model"),
    "seed": (configs(seed=9), r"seed is 0 in the checkpoint, 9 in the model"),
    "no codes": (configs(learned_codes=False), r"the model has no codes, the other side has"),
    "plain": (
        [PLAIN, *configs()[1:]], r"the checkpoint has a CCE table, the model a plain one"
    ),
    "one less": (configs()[:2], r"'collection.u': the checkpoint has it"),
}  # fmt: skip


@on_ranks(2)
@pytest.mark.parametrize("other", OTHER_TABLES)
def test_other_tables_are_refused(rank, world_size, other, good):
    changed, message = OTHER_TABLES[other]
    model, _ = build("cw", 0, configs=changed)
    with pytest.raises(ValueError, match=rf"table '?.*{message}"):
        load_checkpoint(good[0], model)


@on_ranks(2)
def test_state_of_another_optimizer_is_dropped(rank, world_size, good):
    model, dense = build("tw", 0, optimizer="sgd")
    report = load_checkpoint(good[0], model, optimizers=[dense])
    assert report.dropped == [
        f"optimizer state of table 'collection.{name}': saved with RowWiseAdagrad, the model has "
        "SGD"
        for name in ("p", "t", "u")
    ]
    model, _ = build("tw", 0)
    report = load_checkpoint(good[0], model)
    assert report.dropped == [
        f"optimizer state of parameter 'over.{name}': saved with Adam, the model has no optimizer"
        for name in ("bias", "weight")
    ]


@on_ranks(2)
def test_some_tables(rank, world_size, good):
    """One table comes, everything else stays; unknown names are refused."""
    where, expected = good
    model, dense = build("cw", 7)
    before = {k: v.clone() for k, v in model.named_parameters() if "over" in k}
    state = torch.random.get_rng_state()
    kjt = batch(3, False)
    u_before = model.module.collection(kjt)["h@u"].clone()
    report = load_checkpoint(where, model, optimizers=[dense], tables=["t"])
    assert report.tables == ["collection.t"]
    assert torch.equal(state, torch.random.get_rng_state())
    for name, value in model.named_parameters():
        if name in before:
            assert torch.equal(value, before[name])
    after = model.module.collection(kjt)
    assert torch.equal(after["h@u"], u_before)
    assert np.array_equal(after["f@t"].detach(), expected)
    with pytest.raises(ValueError, match=r"tables: no table 'x'; the model has"):
        load_checkpoint(where, model, tables=["x"])


@on_ranks(2)
@pytest.mark.parametrize("kind", ["tw", "cw", "unsharded"])
def test_more_ids(rank, world_size, kind, seen):
    """Old ids keep their codes, new ones have their hash, at every kind of plan."""
    where, saved = seen
    model, _ = build(kind, 5, configs=configs(num_embeddings=500, track_seen=True))
    load_checkpoint(where, model, grow=["t"])
    module = model if kind == "unsharded" else model.module
    own = module.collection.codes["t"]
    if not own.chunks:
        return
    fresh = hashed_codes(own.config, own.chunks, torch.device("cpu"))
    fresh, codes = own.packing.unpack(fresh, 500), own.unpacked
    assert torch.equal(codes[300:], fresh[300:])
    assert not torch.equal(codes[:300], fresh[:300])
    assert own.num_clusterings == 1
    assert own.seen[:37].any() and not own.seen[38:].any()
    for column, chunk in enumerate(own.chunks):
        assert np.array_equal(codes[:300, column], saved[chunk])


@on_ranks(2)
def test_a_failing_save_keeps_the_latest(rank, world_size, tmp_path):
    """Extra that is no JSON, or a rank that fails to write: all raise, the latest stays."""
    model, _ = build("cw", rank)
    save_checkpoint(tmp_path, model, step=1)
    latest = latest_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="not JSON serializable"):
        save_checkpoint(tmp_path, model, step=2, extra={"x": object()})
    broken = mock.patch.object(TensorWriter, "write", side_effect=OSError("no space left"))
    with (
        broken if rank == 1 else contextlib.nullcontext(),
        pytest.raises(ValueError, match="rank 1: no space left"),
    ):
        save_checkpoint(tmp_path, model, step=2)
    assert latest_checkpoint(tmp_path) == latest
    load_checkpoint(tmp_path, model)


@on_ranks(2)
def test_the_newest_stay(rank, world_size, tmp_path):
    """Old ones go, the latest never does, also when a step is saved twice."""
    model, _ = build("cw", rank)
    paths = [save_checkpoint(tmp_path, model, step=n, keep=2).name for n in (1, 2, 3, 3)]
    assert paths[1:] == ["step-000000002-0002", "step-000000003-0003", "step-000000003-0004"]
    dist.barrier()
    assert sorted(path.name for path in tmp_path.iterdir()) == paths[2:]


# torch.distributed.checkpoint used directly: codes that nobody would read are refused.


@on_ranks(2)
def test_a_state_dict_of_codes_into_a_hashed_table(rank, world_size):
    model, _ = build("cw", 0)
    other, _ = build("cw", 0, configs=configs(learned_codes=False))
    with pytest.raises(ValueError, match="table 't': the checkpoint has codes, the model"):
        other.load_state_dict(model.state_dict())


@on_ranks(2)
def test_a_state_dict_without_codes(rank, world_size):
    together, _ = build("tw", 0)  # one rank has no codes of t, and raises all the same
    other, _ = build("tw", 0, configs=configs(learned_codes=False))
    with pytest.raises(RuntimeError, match=r"Missing key.*codes.t.codes"):
        together.load_state_dict(other.state_dict())


@on_ranks(2)
def test_a_state_dict_of_another_plan(rank, world_size):
    (spread, _), (together, _) = build("cw", 0), build("tw", 0)
    with pytest.raises(ValueError, match=r"table '[tu]': .* of another plan; .* dcp.load"):
        together.load_state_dict(spread.state_dict())


@on_ranks(2)
def test_a_state_dict_of_fewer_ids(rank, world_size):
    model, _ = build("cw", 0)
    wider, _ = build("cw", 0, configs=configs(num_embeddings=310))
    state = wider.state_dict()
    state["collection.codes.t.codes"] = model.state_dict()["collection.codes.t.codes"]
    with pytest.raises(ValueError, match=r"\[38, 12\] in .*codes', the model \[39, 12\]"):
        wider.load_state_dict(state)


@on_ranks(2)
@pytest.mark.parametrize(("rows", "helper"), [(10, 10), (20, 0)])
def test_a_state_dict_of_other_helper_rows(rank, world_size, rows, helper):
    """5 and 15 rows become others of the same sum: the shapes are the same."""
    together, _ = build("tw", 0)
    other, _ = build("tw", 1, configs=configs(num_rows=rows, num_helper_rows=helper))
    before = outputs(other)
    # On every rank, also where no chunk of the table is.
    with pytest.raises(ValueError, match=f"'t': .* 15 helper rows, the model {helper};"):
        other.load_state_dict(together.state_dict())
    assert_same_outputs(other, before)


def test_without_process_group(tmp_path):
    """An unsharded model in a single process."""
    model, dense = build("unsharded", 0)
    step(model, dense, 1)
    cluster(model)
    save_checkpoint(tmp_path, model, step=1, optimizers=[dense])
    other, other_dense = build("unsharded", 1)
    assert load_checkpoint(tmp_path, other, optimizers=[other_dense]).dropped == []
    for m, d in ((model, dense), (other, other_dense)):
        step(m, d, 2)
    assert_same_outputs(model, outputs(other))
