"""Where checkpoints are kept: local folders and object stores; and that reading runs no code."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn
from torchrec import KeyedJaggedTensor

from cce_torchrec import CCEEmbeddingBagCollection, CCEEmbeddingBagConfig
from cce_torchrec.checkpoint import latest_checkpoint, load_checkpoint, pending, save_checkpoint
from cce_torchrec.checkpoint.finite import is_finite
from cce_torchrec.checkpoint.location import location, write_whole
from cce_torchrec.checkpoint.tensor_files import TensorReader, TensorWriter
from cce_torchrec.checkpoint.tensor_index import DTYPES
from cce_torchrec.clustering import cluster
from cce_torchrec.signed import signed
from tests.support.optional import needs
from tests.support.s3 import make_bucket, needs_s3, s3_server

WRITTEN = Path(__file__).with_name("format_2")
"""A job of the `Model` below that the code of format 2 saved."""


class Model(nn.Module):
    """A table, a dense layer, and a word as extra state."""

    def __init__(self, num_ids=50, said="nothing"):
        super().__init__()
        table = CCEEmbeddingBagConfig(
            name="t", num_embeddings=num_ids, embedding_dim=16, feature_names=["f"], num_rows=3
        )
        self.collection = CCEEmbeddingBagCollection([table])
        self.over = nn.Linear(16, 1)
        self.said = said

    def forward(self, ids):
        return self.over(self.collection(ids).values())

    def get_extra_state(self):
        return self.said

    def set_extra_state(self, state):
        self.said = state


def ids(count=50):
    lengths = torch.ones(count, dtype=torch.int32)
    return KeyedJaggedTensor(["f"], torch.arange(count), lengths=lengths)


def trained(seed=0, **settings):
    """A model after a step and a clustering, and its optimizer."""
    torch.manual_seed(seed)
    model = Model(**settings)
    optimizer = torch.optim.Adam(model.parameters())
    model(ids()).sum().backward()
    optimizer.step()
    cluster(model, optimizer=optimizer)
    return model, optimizer


def assert_same(one, other, equal=torch.equal):
    """State of two (model, optimizer), bit for bit."""
    for a, b in zip(one[0].state_dict().values(), other[0].state_dict().values(), strict=True):
        assert equal(a, b) if isinstance(a, torch.Tensor) else a == b
    states = [optimizer.state_dict()["state"] for _, optimizer in (one, other)]
    for key, state in states[0].items():
        assert all(equal(value, states[1][key][name]) for name, value in state.items())


def as_on_another_machine(a, b):
    """Its libraries add floats in another order; codes are the same."""
    return (
        torch.allclose(a, b, rtol=1e-5, atol=1e-7) if a.is_floating_point() else torch.equal(a, b)
    )


@pytest.fixture(scope="module")
def s3():
    with s3_server():
        make_bucket("bucket")
        make_bucket("read-only", read_only=True)
        yield


@pytest.fixture(params=["local", pytest.param("memory", marks=needs("upath")),
                        pytest.param("s3", marks=needs_s3)])  # fmt: skip
def store(request, tmp_path):
    """A folder, or the URI of one, in each kind of storage."""
    if request.param == "local":
        return str(tmp_path / "run")
    if request.param == "s3":
        request.getfixturevalue("s3")
    return f"{request.param}://bucket/{tmp_path.name}"


# Local and in object stores


def test_a_job_is_saved_and_resumed(store):
    job, other = trained(said="trained"), trained(seed=1)
    path = save_checkpoint(store, job[0], step=7, optimizers=[job[1]], extra={"a": 1})
    assert str(path) == f"{store}/step-000000007-0001" and latest_checkpoint(store) == path
    expected = torch.rand(3)
    report = load_checkpoint(store, other[0], optimizers=[other[1]])
    assert (report.path, report.step, report.extra, report.dropped) == (path, 7, {"a": 1}, [])
    assert torch.equal(torch.rand(3), expected)
    assert_same(job, other)
    assert other[0].said == "trained"
    assert load_checkpoint(str(path), trained(seed=2)[0]).step == 7


def test_old_checkpoints_go_and_pinned_ones_stay(store):
    model = Model()
    assert latest_checkpoint(store) is None
    for step, pin in enumerate(["", "best", "", "best", "", "", "other"]):
        save_checkpoint(store, model, step=step, pin=pin)
    kept = sorted(path.name for path in location(store).iterdir())
    assert kept == [
        "step-000000003-0004-best", "step-000000005-0006", "step-000000006-0007-other"
    ]  # fmt: skip
    assert latest_checkpoint(store).name == kept[2]
    assert latest_checkpoint(store, pin="best").name == kept[0]
    assert latest_checkpoint(store, pin="nothing") is None
    assert load_checkpoint(latest_checkpoint(store, pin="best"), model).step == 3


def test_the_latest_is_the_last_that_was_saved(store):
    """Also where a run went back to an earlier step, and whatever a kill has left."""
    model = Model()
    for step in (100, 50, 50):
        path = save_checkpoint(store, model, step=step)
    killed = save_checkpoint(store, model, step=60)
    (killed / "manifest.json").unlink()  # which is written last
    assert latest_checkpoint(store) == path
    assert load_checkpoint(store, model).step == 50
    after = save_checkpoint(store, model, step=51)
    assert after.name == "step-000000051-0005"
    assert {p.name for p in location(store).iterdir()} == {path.name, after.name}


@pytest.mark.parametrize("written", range(4))
def test_a_kill_at_any_file_leaves_the_latest(tmp_path, written):
    """The last file is half there; that of the manifest has no other name than its own yet."""
    model = Model()
    latest = save_checkpoint(tmp_path, model, step=1)
    killed = tmp_path / "step-000000002-0002"
    killed.mkdir()
    names = ["rank-0.json", "rank-0.safetensors", "tensors.json", "manifest.json"]
    for name in names[: written + 1]:
        there = killed / (f".{name}.new" if name == "manifest.json" else name)
        content = (latest / name).read_bytes()
        there.write_bytes(content if name != names[written] else content[: len(content) // 2])
    assert latest_checkpoint(tmp_path) == load_checkpoint(tmp_path, model).path == latest
    after = save_checkpoint(tmp_path, model, step=2)
    assert {path.name for path in tmp_path.iterdir()} == {latest.name, after.name}


def test_what_others_keep_in_the_folder_stays(tmp_path):
    for name in ("step-000000001", "step-5", "step-000000001-best", "notes"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("")
    before = {path.name for path in tmp_path.iterdir()}
    path = save_checkpoint(tmp_path, Model(), step=1, keep=1)
    assert {p.name for p in tmp_path.iterdir()} == before | {path.name}


def test_tables_and_growth(store):
    job, larger = trained(), trained(seed=1, num_ids=80)
    save_checkpoint(store, job[0], step=1)
    over = larger[0].over.weight.clone()
    load_checkpoint(store, larger[0], tables=["t"], grow=["t"])
    assert torch.equal(larger[0].over.weight, over)
    assert torch.equal(*(m.collection(ids()).values() for m in (job[0], larger[0])))


def test_a_missing_file_is_named(store):
    path = save_checkpoint(store, Model(), step=1)
    (path / "rank-0.safetensors").unlink()
    with pytest.raises(ValueError, match=r"step-000000001-0001/rank-0.safetensors is missing"):
        load_checkpoint(store, Model())


def test_safetensors_reads_the_file(tmp_path):
    reference = pytest.importorskip("safetensors.torch")
    model, _ = trained()
    path = save_checkpoint(tmp_path, model, step=1)
    found = reference.load_file(path / "rank-0.safetensors")
    for name, value in model.state_dict().items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(found[f"model.{name}"], value)


def test_every_type_comes_back(tmp_path):
    class Buffers(nn.Module):
        def __init__(self, value):
            super().__init__()
            for name, dtype in DTYPES.items():
                self.register_buffer(name, torch.full((3, 5), value).to(dtype))
            self.register_buffer("scalar", torch.tensor(float(value)))
            self.register_buffer("empty", torch.zeros(0, 4))

    save_checkpoint(tmp_path, Buffers(1), step=1)
    other = Buffers(0)
    load_checkpoint(tmp_path, other)
    for name, value in Buffers(1).named_buffers():
        found = dict(other.named_buffers())[name]
        assert found.dtype == value.dtype and found.tolist() == value.tolist()


@pytest.mark.parametrize("state", [{"a": {1: 2}}, (1, 2), object(), {"t": torch.ones(2)}])
def test_extra_state_that_is_not_plain_is_refused(tmp_path, state):
    with pytest.raises(ValueError, match=r"model._extra_state: a checkpoint holds tensors and pla"):
        save_checkpoint(tmp_path, Model(said=state), step=1)
    assert latest_checkpoint(tmp_path) is None


@pytest.mark.parametrize("state", [{"a": [1, 2.5, None]}, [], "x", 3, True])
def test_extra_state_that_is_plain_comes_back(tmp_path, state):
    save_checkpoint(tmp_path, Model(said=state), step=1)
    other = Model()
    load_checkpoint(tmp_path, other)
    assert other.said == state


# Where nothing can be written


@needs("upath")
@pytest.mark.parametrize("uri", ["nothing://bucket/run", "s3x://bucket/run", "C3://a"])
def test_an_unknown_scheme_is_named(uri):
    for call in (
        lambda: save_checkpoint(uri, Model(), step=1),
        lambda: load_checkpoint(uri, Model()),
    ):
        with pytest.raises(ValueError, match=f"{uri}: fsspec cannot open"):
            call()
    assert not Path(uri.partition("/")[0]).exists()


def test_without_the_packages_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "upath", None)
    for uri in ("s3://bucket/run", "gs://bucket/run", "memory://run"):
        with pytest.raises(ValueError, match=r"pip install 'cce-torchrec\[object-stores\]'"):
            save_checkpoint(uri, Model(), step=1)


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        (Path("s3://bucket/run"), "s3:/bucket/run would be a local folder; pass a URI as text"),
        ("s3:/bucket/run", "s3:/bucket/run would be a local folder; pass a URI as text"),
        ("file:/tmp/run", "file:/tmp/run would be a local folder; pass a URI as text"),
        ("file://localhost/run", "file://localhost/run names a host, or no whole path; write file"),
        ("file://run", "file://run names a host, or no whole path; write file:///path"),
    ],
)
def test_what_would_be_another_folder_is_refused(folder, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        save_checkpoint(folder, Model(), step=1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["run:1", "a b", "50%20", "lr:0.1/run"])
def test_a_folder_of_any_name_is_local(tmp_path, name):
    assert location(f"file://{tmp_path}/{name}") == tmp_path / name
    assert location(f"FILE://{tmp_path}/{name}") == location(f"{tmp_path}/{name}")
    assert location(name) == Path(name)


@needs("upath")
@pytest.mark.parametrize("scheme", ["", "file://", "local://"])
def test_a_local_path_of_another_library_is_local(tmp_path, scheme):
    import upath

    path = save_checkpoint(upath.UPath(f"{scheme}{tmp_path}/run"), Model(), step=1)
    assert path == tmp_path / "run" / "step-000000001-0001" and type(path) is type(tmp_path)
    assert location(f"{scheme}{tmp_path}/run") == tmp_path / "run"


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(ValueError, match=r"run cannot be written"):
        save_checkpoint(tmp_path / "run", Model(), step=1)


@needs_s3
@pytest.mark.parametrize("bucket", ["read-only", "no-such-bucket"])
def test_a_bucket_that_takes_nothing_is_named(s3, bucket):
    with pytest.raises(ValueError, match=f"s3://{bucket}/run/.* cannot be written"):
        save_checkpoint(f"s3://{bucket}/run", Model(), step=1)
    assert latest_checkpoint(f"s3://{bucket}/run") is None


# Checkpoints of strangers


class Payload:
    """Pickled, it makes a file when it is read."""

    def __init__(self, made):
        self.made = made

    def __reduce__(self):
        return Path.touch, (self.made,)


def planted(checkpoint, name, content):
    """Replaces a file, and what the manifest says of it, as whoever means harm would."""
    (checkpoint / name).write_bytes(content)
    if name != "manifest.json":
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        manifest["files"][name] = [len(content), zlib.crc32(content)]
        (checkpoint / "manifest.json").write_text(json.dumps(signed(manifest)))


FILES = [
    (2, ".metadata"), (2, "__0_0.distcp"), (2, "manifest.json"), (2, "rank-0.json"),
    (3, "manifest.json"), (3, "tensors.json"), (3, "rank-0.json"), (3, "rank-0.safetensors"),
]  # fmt: skip


@pytest.mark.parametrize(("format_", "name"), FILES)
def test_a_payload_in_any_file_does_not_run(tmp_path, format_, name):
    model, optimizer = trained()
    if format_ == 2:
        shutil.copytree(WRITTEN, tmp_path / "run")
    else:
        save_checkpoint(tmp_path / "run", model, step=1, optimizers=[optimizer])
    checkpoint = latest_checkpoint(tmp_path / "run")
    names = {path.name for path in checkpoint.iterdir()}
    assert names == {file for number, file in FILES if number == format_}
    payload = Payload(tmp_path / "made")
    torch.save(payload, tmp_path / "saved")
    contents = [pickle.dumps(payload, protocol) for protocol in (0, 2, 4)]
    before = {key: value.clone() for key, value in model.named_parameters()}
    for content in [*contents, (tmp_path / "saved").read_bytes()]:
        planted(checkpoint, name, content)
        with pytest.raises(ValueError):
            load_checkpoint(checkpoint, model, optimizers=[optimizer])
        assert not (tmp_path / "made").exists()
    if name != "__0_0.distcp":  # whose tensors are read one by one
        assert all(torch.equal(v, before[k]) for k, v in model.named_parameters())
    pickle.loads(contents[0])
    assert (tmp_path / "made").exists(), "the payload would have run"


def test_format_2_is_read(tmp_path):
    model, other = trained(said="trained"), trained(seed=1)
    shutil.copytree(WRITTEN, tmp_path / "run")
    report = load_checkpoint(tmp_path / "run", other[0], optimizers=[other[1]])
    assert (report.step, report.extra, report.dropped) == (1, {"epoch": 1}, [])
    assert_same(model, other, as_on_another_machine)
    new = save_checkpoint(tmp_path / "run", model[0], step=2)
    assert latest_checkpoint(tmp_path / "run") == new
    save_checkpoint(tmp_path / "run", model[0], step=3)
    assert not (tmp_path / "run/step-000000001").exists()
    assert not (tmp_path / "run/latest").exists()


def halves(shard, index, second):
    """Two shards of half the size, the other of which begins at `second`, and so leaves a hole."""
    parts = [dict(shard, shape=[1, 8], offsets=[0, first]) for first in (0, second)]
    index["model.over.weight"]["shards"] = parts


def change_index(change):
    def changed(checkpoint):
        index = json.loads((checkpoint / "tensors.json").read_text())
        change(index["model.over.weight"]["shards"][0], index)
        planted(checkpoint, "tensors.json", json.dumps(index).encode())

    return changed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, _: s.update(file="../secret"), "the manifest has no file '../secret'"),
        (lambda s, _: s.update(file="/etc/passwd"), "the manifest has no file '/etc/passwd'"),
        (lambda s, _: s.update(at=1 << 40), "ends before the shard"),
        (lambda s, _: s.update(at=-8), "ends before the shard"),
        (lambda s, _: s.update(at=8.0), "over.weight: 'float' object cannot be"),
        (lambda s, _: s.update(shape=[1, 1 << 80]), "is outside"),
        (lambda _, i: i["model.over.weight"].update(shape=[-1, -16], shards=[]), "do not make up"),
        (lambda _, i: i.update({"model.over.weight": None}), "over.weight: argument of type"),
        (lambda _, i: i.update({"model.over.weight": {"object": 1}}), "over.weight: shape an obj"),
        (lambda _, i: i.update({"model._extra_state": i["model.over.bias"]}), "_extra_state: shap"),
        (lambda s, i: halves(s, i, 0), r"its shards do not make up \[1, 16\]"),
        (lambda s, i: halves(s, i, 7), r"its shards do not make up \[1, 16\]"),
        (lambda s, _: s.update(shape=[1, 8]), r"its shards do not make up \[1, 16\]"),
        (lambda s, _: s.update(offsets=[0, -1]), "is outside"),
        (lambda s, _: s.update(shape=[1, 17]), "is outside"),
        (lambda _, i: i["model.over.weight"].update(dtype="X9"), "X9"),
        (lambda _, i: i["model.over.weight"].pop("shards"), "shards"),
        (lambda _, i: i.pop("model.over.weight"), r"the model has \[over.weight\]"),
    ],
)
def test_an_index_that_says_what_cannot_be_is_refused(tmp_path, change, message):
    model = Model()
    path = save_checkpoint(tmp_path, model, step=1)
    before = {key: value.clone() for key, value in model.named_parameters()}
    change_index(change)(path)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(path, model)
    assert all(torch.equal(v, before[k]) for k, v in model.named_parameters())


@pytest.mark.parametrize("content", [b"[]", b"\x80", b"[" * 10**5, b""])
def test_an_index_that_is_none_is_refused(tmp_path, content):
    path = save_checkpoint(tmp_path, Model(), step=1)
    planted(path, "tensors.json", content)
    with pytest.raises(ValueError, match=r"tensors.json is damaged \(as a whole: .*; load another"):
        load_checkpoint(path, Model())


def change_manifest(path, change):
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(signed(manifest)))


@pytest.mark.parametrize("format_", [2, 3])
def test_an_index_that_the_manifest_does_not_name_is_not_read(tmp_path, format_):
    name = {2: ".metadata", 3: "tensors.json"}[format_]
    if format_ == 2:
        shutil.copytree(WRITTEN, tmp_path / "run")
    else:
        save_checkpoint(tmp_path / "run", Model(), step=1)
    path = latest_checkpoint(tmp_path / "run")
    change_manifest(path, lambda manifest: manifest["files"].pop(name))
    with pytest.raises(ValueError, match=f"{name} is damaged .*the manifest has no file '{name}'"):
        load_checkpoint(path, Model())


@pytest.mark.parametrize("field", ["settings", "state", "values"])
@pytest.mark.parametrize("value", [None, [1], "lr"])
def test_optimizer_settings_that_are_none_change_nothing(tmp_path, field, value):
    (model, optimizer), other = trained(), trained(seed=1)
    path = save_checkpoint(tmp_path, model, step=1, optimizers=[optimizer])
    change_manifest(path, lambda m: m["optimizers"]["over.weight"].update({field: value}))
    before = other[0].over.weight.clone()
    with pytest.raises(ValueError, match=f"manifest.json is damaged .{field} of an optimizer"):
        load_checkpoint(path, other[0], optimizers=[other[1]])
    assert torch.equal(other[0].over.weight, before)


@pytest.mark.parametrize(
    "change",
    [dict.clear, lambda s: s.update(torch="00"), lambda s: s["numpy"].__setitem__(1, [1, 2]),
     lambda s: s.pop("python")],
)  # fmt: skip
def test_random_state_that_is_none_changes_nothing(tmp_path, change):
    path = save_checkpoint(tmp_path, Model(), step=1)
    state = json.loads((path / "rank-0.json").read_text())
    change(state)
    planted(path, "rank-0.json", json.dumps(state).encode())
    model = Model()
    before, expected = model.over.weight.clone(), torch.get_rng_state()
    with pytest.raises(ValueError, match=r"rank-0.json is damaged .*; load another"):
        load_checkpoint(path, model)
    assert torch.equal(model.over.weight, before) and torch.equal(torch.get_rng_state(), expected)


def test_tensors_that_contradict_the_manifest_may_be_there_in_part(tmp_path, monkeypatch):
    """Such as another number of helper rows, which modules find when all is read."""
    path, model = save_checkpoint(tmp_path, Model(), step=1), Model()

    def refuse(*args, **kwargs):
        raise ValueError("another number of rows")

    monkeypatch.setattr(model, "load_state_dict", refuse)
    with pytest.raises(ValueError, match=r"another number of rows\); the model may be over"):
        load_checkpoint(path, model)


@pytest.mark.parametrize("fails", ["fsync", "rename"])
def test_a_file_that_cannot_be_written_leaves_nothing_and_the_one_before(
    tmp_path, monkeypatch, fails
):
    def full(*args):
        raise OSError(28, "No space left on device")

    path = tmp_path / "metrics.jsonl"
    write_whole(path, "before")
    monkeypatch.setattr(*{"fsync": (os, "fsync", full), "rename": (Path, "rename", full)}[fails])
    with pytest.raises(ValueError, match=r"metrics.jsonl.* cannot be written .*No space left"):
        write_whole(path, "after")
    assert [file.read_text() for file in tmp_path.iterdir()] == ["before"]


def test_a_file_that_never_ends_is_not_read(tmp_path):
    path = save_checkpoint(tmp_path, Model(), step=1)
    (path / "rank-0.json").unlink()
    (path / "rank-0.json").symlink_to("/dev/zero")
    change_manifest(path, lambda manifest: manifest["files"].update({"rank-0.json": [0, 0]}))
    with pytest.raises(ValueError, match=r"rank-0.json is missing"):
        load_checkpoint(path, Model())


def test_a_file_that_cannot_be_read_later_is_named(tmp_path):
    path = save_checkpoint(tmp_path, Model(), step=1)
    with (
        mock.patch.object(TensorReader, "read_data", side_effect=OSError("stale file handle")),
        pytest.raises(ValueError, match=r"0001: reading failed \(rank 0: stale .*: load again"),
    ):
        load_checkpoint(path, Model())


# NaN


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["table", "dense", "optimizer"])
def test_values_that_are_not_finite_are_refused(tmp_path, where, value):
    model, optimizer = trained()
    good = save_checkpoint(tmp_path, model, step=1, keep=1)
    dense = model.over.weight
    weight = next(model.collection.parameters())
    target = {"table": weight, "dense": dense, "optimizer": optimizer.state[dense]["exp_avg"]}
    target[where].data.view(-1)[-1] = value
    names = {
        "table": r"table 'collection.t' \(model ",
        "dense": r"model over.weight",
        "optimizer": r"optimizer over.weight.exp_avg",
    }
    with pytest.raises(ValueError, match=f"{names[where]}.*: NaN or infinite values; nothing was"):
        save_checkpoint(tmp_path, model, step=2, optimizers=[optimizer], keep=1)
    assert [path.name for path in tmp_path.iterdir()] == [good.name]
    save_checkpoint(tmp_path, model, step=2, optimizers=[optimizer], check_finite=False)


def test_finite_values_of_which_the_sum_overflows():
    assert is_finite(torch.full((9,), 3e38)) and is_finite(torch.full((9,), 6e4).half())
    assert not is_finite(torch.tensor([3e38, 3e38, float("nan")]))
    assert is_finite(torch.ones(3, dtype=torch.int8)) and is_finite(torch.zeros(0))
    small = torch.tensor([1.0, float("nan")]).to(torch.float8_e5m2)
    assert is_finite(small[:1]) and not is_finite(small)


def test_infinite_buffers_are_saved(tmp_path):
    model = Model()
    model.register_buffer("mask", torch.tensor([0, -float("inf")]))
    save_checkpoint(tmp_path, model, step=1)
    load_checkpoint(tmp_path, model)


@pytest.mark.parametrize("pin", ["a/b", "../x", "a-b", "é/", "best\n", None, 1])
def test_a_pin_that_is_no_part_of_a_name_is_refused(tmp_path, pin):
    with pytest.raises(ValueError, match="use letters, digits and _"):
        save_checkpoint(tmp_path, Model(), step=1, pin=pin)


@pytest.mark.parametrize("step", [-1, 1.0, "5", None])
def test_a_step_that_no_folder_is_named_by_is_refused(tmp_path, step):
    with pytest.raises(ValueError, match=f"step {step!r} is .*; pass the steps so far"):
        save_checkpoint(tmp_path, Model(), step=step)


def test_steps_may_be_of_other_libraries(tmp_path):
    for step in (np.int64(3), torch.tensor(4)):
        path = save_checkpoint(tmp_path, Model(), step=step)
        assert load_checkpoint(tmp_path, Model()).step == int(step) and path.exists()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (Counter([30, 80]), "extra has the key 30 .int., and JSON has text alone"),
        ({"a": [({True: 1},)]}, "extra has the key True .bool., and JSON has text alone"),
        ({"a": torch.ones(1)}, "extra is kept as JSON .Object of type Tensor"),
        ({"a": {1, 2}}, "extra is kept as JSON .Object of type set"),
    ],
)
def test_extra_that_would_come_back_as_something_else_is_refused(tmp_path, extra, message):
    with pytest.raises(ValueError, match=message):
        save_checkpoint(tmp_path, Model(), step=1, extra=extra)
    assert latest_checkpoint(tmp_path) is None


@pytest.mark.parametrize(
    "tensor",
    [
        torch.eye(3).to_sparse(), torch.zeros(3, device="meta"), torch.zeros(2, dtype=torch.cdouble)
    ],
)  # fmt: skip
def test_a_tensor_that_the_files_cannot_hold_is_named(tmp_path, tensor):
    model = Model()
    model.register_buffer("odd", tensor)
    with pytest.raises(ValueError, match=r"model.odd: a .* tensor of .* on .*; convert it"):
        save_checkpoint(tmp_path, model, step=1)


def test_a_conjugate_is_saved_as_its_values(tmp_path):
    model, other = nn.Module(), nn.Module()
    model.register_buffer("a", torch.tensor([1 + 2j]).conj())
    other.register_buffer("a", torch.zeros(1, dtype=torch.cfloat))
    save_checkpoint(tmp_path, model, step=1)
    load_checkpoint(tmp_path, other)
    assert other.a.tolist() == [1 - 2j]


def test_the_default_device_does_not_matter(tmp_path):
    """Meta stands for a GPU, whose memory numpy cannot read either."""
    model, other = Model(), Model()
    with torch.device("meta"):
        save_checkpoint(tmp_path, model, step=1)
        load_checkpoint(tmp_path, other)
    assert torch.equal(model.over.weight, other.over.weight)


def test_a_module_without_tensors_comes_back(tmp_path):
    save_checkpoint(tmp_path, nn.Identity(), step=1)
    assert load_checkpoint(tmp_path, nn.Identity()).step == 1


# While training goes on


@pytest.fixture
def stopped(monkeypatch):
    """The background thread, which waits until the test lets it go on."""
    thread, go_on = ThreadPoolExecutor(max_workers=1), threading.Event()
    monkeypatch.setattr(pending, "_THREAD", thread)
    thread.submit(go_on.wait)
    yield go_on
    go_on.set()
    thread.shutdown()


def test_what_is_saved_is_what_was_there_at_the_call(store, stopped):
    job, expected, other = trained(), trained(), trained(seed=1)
    extra = {"a": 1}
    handle = save_checkpoint(
        store, job[0], step=1, optimizers=[job[1]], extra=extra, blocking=False
    )
    for parameter in job[0].parameters():
        parameter.data.zero_()
    cluster(job[0])
    extra["a"] = 2
    assert not handle.done() and latest_checkpoint(store) is None
    stopped.set()
    assert handle.result() == latest_checkpoint(store) and handle.done()
    assert load_checkpoint(store, other[0], optimizers=[other[1]]).extra == {"a": 1}
    assert_same(expected, other)


def test_extra_state_is_that_of_the_call(tmp_path, stopped):
    model, other = Model(said={"a": [1]}), Model()
    handle = save_checkpoint(tmp_path, model, step=1, blocking=False)
    model.said["a"].append(2)
    stopped.set()
    handle.result()
    load_checkpoint(tmp_path, other)
    assert other.said == {"a": [1]}


def test_a_program_that_ends_waits():
    """Also where what writes needs threads, as clients of object stores do."""
    program = """
import time
from concurrent.futures import ThreadPoolExecutor
from cce_torchrec.checkpoint.pending import PendingCheckpoint
from cce_torchrec.collectives import Ranks

def write(ranks):
    time.sleep(0.2)
    return ThreadPoolExecutor().submit(print, "written").result()

PendingCheckpoint(write, Ranks(None))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    if sys.version_info >= (3, 12):  # which starts no thread once a program ends
        assert "a checkpoint was not written: can't create new thread" in done.stderr
        return
    assert done.stdout == "written\n", done.stderr


def test_the_next_save_waits(tmp_path, stopped):
    model = Model()
    handle = save_checkpoint(tmp_path, model, step=1, blocking=False)
    stopped.set()
    path = save_checkpoint(tmp_path, model, step=2)
    assert handle.done() and path.name == "step-000000002-0002"
    assert len(list(tmp_path.iterdir())) == 2


def test_a_failure_is_raised_once(tmp_path):
    model = Model()
    good = save_checkpoint(tmp_path, model, step=1)
    with mock.patch.object(TensorWriter, "write", side_effect=OSError("no space left")):
        handle = save_checkpoint(tmp_path, model, step=2, blocking=False)
        with pytest.raises(ValueError, match="no space left"):
            handle.result()
        save_checkpoint(tmp_path, model, step=3, blocking=False)
        with pytest.raises(ValueError, match="no space left"):
            save_checkpoint(tmp_path, model, step=4)
    assert [path.name for path in tmp_path.iterdir()] == [good.name]
    assert save_checkpoint(tmp_path, model, step=4, blocking=False).result().exists()
