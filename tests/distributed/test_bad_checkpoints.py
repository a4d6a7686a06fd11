"""Checkpoints that are damaged or do not fit: the same error on every rank, nothing changed."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType

from cce_torchrec.checkpoint import folder as folders
from cce_torchrec.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from cce_torchrec.clustering import cluster
from cce_torchrec.codes.storage import hashed_codes
from tests.distributed.test_checkpoint import build, outputs, step
from tests.distributed.test_sharded import batch, tables
from tests.support.ranks import run_ranks


def configs(**changes):
    """The tables of the tests with fields of table t changed."""
    t, p, u = tables(PoolingType.SUM)
    return [replace(t, **changes), p, u]


def damaged(path: Path, how: str) -> None:
    data = sorted(path.glob("__*.distcp"))
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
    elif how == "corrupt metadata":
        (path / ".metadata").write_bytes(b"\x00" * (path / ".metadata").stat().st_size)
    elif how == "manifest":
        (path / "manifest.json").write_text('{"format": 1, "ti')
    else:  # a kill in mid-write: the manifest comes last
        (path / "manifest.json").unlink()


DAMAGES = {
    "missing rank file": r"__1_0.distcp is missing",
    "missing random state": r"rank-1.json is missing",
    "truncated": r"has \d+ bytes, its manifest says \d+",
    "corrupt": r"is damaged \(its checksum differs\)",
    "corrupt metadata": r".metadata is damaged",
    "manifest": r"manifest.json is damaged",
    "mid-write": r"is no whole checkpoint",
}


def refuse_damage(rank, folder, model, dense):
    before = outputs(model)
    for how, message in DAMAGES.items():
        bad = Path(folder, how)
        if rank == 0:
            shutil.copytree(Path(folder, "good"), bad)
            damaged(latest_checkpoint(bad), how)
        dist.barrier()
        with pytest.raises(ValueError, match=message):
            load_checkpoint(bad, model, optimizers=[dense])
    with pytest.raises(ValueError, match="no checkpoint in"):
        load_checkpoint(f"{folder}/nothing", model)
    for a, b in zip(outputs(model), before, strict=True):
        assert np.array_equal(a, b)


def refuse_other_tables(where):
    plain = EmbeddingBagConfig(
        name="t", num_embeddings=300, embedding_dim=16, feature_names=["f", "g"],
        pooling=PoolingType.SUM,
    )  # fmt: skip
    for changed, message in (
        (configs(num_embeddings=301), r"num_embeddings is 300 in the checkpoint, 301 in the mod"),
        (configs(num_embeddings=299), r"num_embeddings is 300 in the checkpoint, 299 in the mod"),
        (configs(num_chunks=2), r"num_chunks is 4 in the checkpoint, 2 in the model"),
        (configs(num_rows=6), r"num_rows is 5 in the checkpoint, 6 in the model"),
        (configs(seed=9), r"seed is 0 in the checkpoint, 9 in the model"),
        (configs(learned_codes=False), r"the model has no codes, the other side has"),
        ([plain, *configs()[1:]], r"the checkpoint has a CCE table, the model a plain one"),
        (configs()[:2], r"'collection.u': the checkpoint has it"),
    ):
        model, _ = build("cw", 0, configs=changed)
        with pytest.raises(ValueError, match=rf"table '?.*{message}"):
            load_checkpoint(where, model)


def other_optimizer(where):
    model, dense = build("tw", 0, optimizer="sgd")
    report = load_checkpoint(where, model, optimizers=[dense])
    assert report.dropped == [
        f"optimizer state of table 'collection.{name}': saved with RowWiseAdagrad, the model has "
        "SGD"
        for name in ("p", "t", "u")
    ]
    model, _ = build("tw", 0)
    report = load_checkpoint(where, model)
    assert report.dropped == [
        f"optimizer state of parameter 'over.{name}': saved with Adam, the model has no optimizer"
        for name in ("bias", "weight")
    ]


def some_tables(where, expected):
    """One table comes, everything else stays; unknown names are refused."""
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
    assert torch.equal(after["f@t"], expected)
    with pytest.raises(ValueError, match=r"tables: no table 'x'; the model has"):
        load_checkpoint(where, model, tables=["x"])


def more_ids(where, source):
    """Old ids keep their codes, new ones have their hash, at every kind of plan."""
    larger = configs(num_embeddings=500, track_seen=True)
    saved = dict(source.module.collection.codes.named_children()).get("t")
    for kind in ("tw", "cw", "unsharded"):
        model, _ = build(kind, 5, configs=larger)
        load_checkpoint(where, model, grow=["t"])
        module = model if kind == "unsharded" else model.module
        if "t" not in module.collection.codes:
            continue
        own = module.collection.codes["t"]
        fresh = hashed_codes(own.config, own.chunks, torch.device("cpu"))
        assert torch.equal(own.codes[300:], fresh[300:])
        assert not torch.equal(own.codes[:300], fresh[:300])
        assert own.num_clusterings == 1
        assert own.seen[:37].any() and not own.seen[38:].any()
        if saved is not None:
            for column, chunk in enumerate(saved.chunks):
                if chunk in own.chunks:
                    mine = own.codes[:300, own.chunks.index(chunk)]
                    assert torch.equal(mine, saved.codes[:, column])


def failing_save(rank, folder, model):
    """Extra that is no JSON, or a rank that fails to write: all raise, the latest stays."""
    latest = latest_checkpoint(folder)
    with pytest.raises(ValueError, match="not JSON serializable"):
        save_checkpoint(folder, model, step=2, extra={"x": object()})
    usual = folders.fingerprint

    def full_disk(file):
        raise OSError("no space left")

    folders.fingerprint = full_disk if rank == 1 else usual
    with pytest.raises(ValueError, match="rank 1: no space left"):
        save_checkpoint(folder, model, step=2)
    folders.fingerprint = usual
    assert latest_checkpoint(folder) == latest
    load_checkpoint(folder, model)


def newest_stay(rank, folder, model):
    """Old ones go, the latest never does, also when a step is saved twice."""
    paths = [save_checkpoint(folder, model, step=n, keep=2).name for n in (1, 2, 3, 3, 3)]
    assert paths[2:] == ["step-000000003", "step-000000003-again", "step-000000003"]
    dist.barrier()
    kept = sorted(path.name for path in Path(folder).iterdir())
    assert kept == ["latest", "step-000000003", "step-000000003-again"]


def everything(rank, world_size, folder):
    model, dense = build("cw", rank)
    step(model, dense, 1)
    cluster(model)
    where = f"{folder}/good"
    save_checkpoint(where, model, step=1, optimizers=[dense])
    refuse_damage(rank, folder, model, dense)
    refuse_other_tables(where)
    other_optimizer(where)
    some_tables(where, model.module.collection(batch(3, False))["f@t"].clone())
    seen, _ = build("cw", rank, configs=configs(track_seen=True))
    seen.train()
    seen(batch(3, False))
    cluster(seen)
    seen(batch(3, False))
    save_checkpoint(f"{folder}/seen", seen, step=1)
    more_ids(f"{folder}/seen", seen)
    failing_save(rank, where, model)
    newest_stay(rank, f"{folder}/kept", model)


def test_bad_checkpoints(tmp_path):
    run_ranks(2, everything, str(tmp_path))


def raw_codes(rank, world_size):
    """torch.distributed.checkpoint used directly: codes that nobody would read are refused."""
    model, _ = build("cw", 0)
    other, _ = build("cw", 0, configs=configs(learned_codes=False))
    with pytest.raises(ValueError, match="table 't': the checkpoint has codes, the model"):
        other.load_state_dict(model.state_dict())
    together, _ = build("tw", 0)  # one rank has no codes of t, and raises all the same
    other, _ = build("tw", 0, configs=configs(learned_codes=False))
    with pytest.raises(RuntimeError, match=r"Missing key.*codes.t.codes"):
        together.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match=r"table '[tu]': .* of another plan; .* dcp.load"):
        together.load_state_dict(model.state_dict())
    wider, _ = build("cw", 0, configs=configs(num_embeddings=301))
    state = wider.state_dict()
    state["collection.codes.t.codes"] = model.state_dict()["collection.codes.t.codes"]
    with pytest.raises(ValueError, match=r"codes \[300, 4\], the model \[301, 4\]"):
        wider.load_state_dict(state)
    for rows, helper in ((10, 10), (20, 0)):  # 5 and 15 before: the shapes are the same
        other, _ = build("tw", 1, configs=configs(num_rows=rows, num_helper_rows=helper))
        before = outputs(other)
        # On every rank, also where no chunk of the table is.
        with pytest.raises(ValueError, match=f"'t': .* 15 helper rows, the model {helper};"):
            other.load_state_dict(together.state_dict())
        for a, b in zip(outputs(other), before, strict=True):
            assert np.array_equal(a, b)


def test_codes_in_a_plain_state_dict():
    run_ranks(2, raw_codes)


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
    for a, b in zip(outputs(model), outputs(other), strict=True):
        assert np.array_equal(a, b)
