"""`cce-torchrec export`: the tables of a checkpoint in every form, without the model's code."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from cce_torchrec import CCEEmbeddingCollection, checkpoint_info, load_checkpoint, save_checkpoint
from cce_torchrec.checkpoint import compress_like
from cce_torchrec.checkpoint.folder import find
from cce_torchrec.inference import inference_collection, load_inference, sampled, vectors_of
from cce_torchrec.inference.from_checkpoint import FORMS
from tests.support.command_line import called
from tests.support.inference import batch_of, one_table, trained


def saved(folder, **collections):
    save_checkpoint(folder, nn.ModuleDict(collections), step=1)
    return folder


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A weighted collection with tables of every kind, finalized in part, inside a model."""
    collection = trained(True, "finalized")
    return saved(tmp_path_factory.mktemp("job") / "run", sparse=collection), collection


@pytest.mark.parametrize("data_type", ["fp32", "fp16", "int8", "int4"])
def test_a_folder_is_that_of_the_trained_collection(job, tmp_path, data_type):
    folder, collection = job
    called("export", folder, tmp_path / "out", "--data-type", data_type)
    found = load_inference(tmp_path / "out")
    expected = inference_collection(collection, data_type=data_type)
    batch = batch_of(collection, 40)
    assert found(batch).keys() == expected(batch).keys() == collection(batch).keys()
    assert torch.equal(found(batch).values(), expected(batch).values())


@pytest.mark.parametrize("stage", ["fresh", "clustered"])
def test_tables_need_not_be_finalized(tmp_path, stage):
    collection = trained(False, stage)
    saved(tmp_path / "run", sparse=collection)
    called("export", tmp_path / "run", tmp_path / "out", "--data-type", "fp32")
    batch = batch_of(collection, 40)
    found = load_inference(tmp_path / "out")(batch).values()
    torch.testing.assert_close(found, collection(batch).values(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "words"),
    [("a.pt", ()), ("a.pt2", ("--format", "program")), ("a.onnx", ()), ("folder", ("--ignores",))],
)
def test_other_forms_are_written_and_compared(job, tmp_path, name, words):
    told = called("export", job[0], tmp_path / name, *words)
    assert "features, in the order of ids: f, g, h, raw, q, x, y" in told
    assert "compared 64 ids of each feature with the checkpoint: off by" in told
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["a.npy", "a.parquet"])
def test_vectors_of_a_feature_are_written(job, tmp_path, name):
    folder, collection = job
    told = called("export", folder, tmp_path / name, "--feature", "x")
    expected = vectors_of(inference_collection(collection, data_type="fp32"), "x", torch.arange(40))
    if name == "a.npy":
        assert np.array_equal(np.load(tmp_path / name), expected)
    assert "rows of fp32" in told and "off by 0 where" in told


def test_sequences_are_written_as_folders(tmp_path):
    config = one_table().embedding_bag_configs()[0]
    sequences = CCEEmbeddingCollection([config], need_indices=False)
    saved(tmp_path / "run", seq=sequences, bags=one_table())
    words = ("export", tmp_path / "run")
    told = called(*words, tmp_path / "out", status=1)
    assert "has several collections; give --collection, one of ['bags', 'seq']" in told
    called(*words, tmp_path / "out", "--collection", "seq", "--data-type", "fp32")
    found = load_inference(tmp_path / "out")
    ids = torch.arange(1000)
    expected = inference_collection(sequences, data_type="fp32")
    assert torch.equal(vectors_of(found, "f", ids), vectors_of(expected, "f", ids))
    told = called(*words, tmp_path / "a.pt", "--collection", "seq", status=1)
    assert "'seq' is of sequences, which are written as folder or vectors" in told


def without_reading(folder):
    """Makes the manifest one of before features were saved."""
    file = find(folder) / "manifest.json"
    manifest = json.loads(file.read_text())
    for table in manifest["tables"].values():
        del table["reading"]
    del manifest["crc32"]  # which came later still
    file.write_text(json.dumps(manifest))


def test_older_checkpoints_are_told_how_tables_are_read(tmp_path):
    collection = one_table(feature_names=["f", "g"])
    saved(tmp_path / "run", sparse=collection)
    reading = checkpoint_info(tmp_path / "run").tables["sparse.a"].reading
    assert (reading.features, reading.pooling, reading.weighted) == (["f", "g"], "SUM", False)
    without_reading(tmp_path / "run")
    words = ("export", tmp_path / "run")
    assert "order of ids: a\n" in called(*words, tmp_path / "one")
    told = called(*words, tmp_path / "two", "--features", "a=f,g", "--pooling", "sparse.a=mean",
                  "--weighted")  # fmt: skip
    assert "order of ids: f, g\n" in told
    served = load_inference(tmp_path / "two")
    assert served.weighted and all(feature.mean for feature in served.packed.features)
    told = called(*words, tmp_path / "three", "--features", "b=f", status=1)
    assert "features: no table 'b'; the model has ['sparse.a']" in told
    assert "'f' is not TABLE=VALUE" in called(*words, tmp_path / "x", "--features", "f", status=2)


def test_what_reads_tables_is_not_compared_by_loads(tmp_path):
    saved(tmp_path / "run", sparse=one_table(feature_names=["f"]))
    renamed = nn.ModuleDict({"sparse": one_table(feature_names=["other", "more"])})
    assert load_checkpoint(tmp_path / "run", renamed).tables == ["sparse.a"]
    with pytest.raises(ValueError, match="none is a plain table of the model"):
        compress_like(renamed, tmp_path / "run")


def test_an_export_that_differs_is_removed(job, tmp_path, monkeypatch):
    monkeypatch.setattr(sampled, "TOLERANCES", dict.fromkeys(sampled.TOLERANCES, 1e-9))
    for name in ("folder", "a.pt", "a.onnx"):
        told = called("export", job[0], tmp_path / name, status=1)
        assert "is not what was trained: feature " in told
        assert not list(tmp_path.iterdir())
    told = called("export", job[0], tmp_path / "folder", "--no-check")
    assert "compared" not in told and (tmp_path / "folder" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("a.bin", (), "write a folder without a suffix, or one of"),
        ("a.pt", ("--format", "onnx"), "the name of a onnx ends in .onnx"),
        ("a", ("--collection", "other"), "has no collection 'other'; give --collection, one of"),
        ("a", ("--feature", "f"), "a feature is chosen for vectors"),
        ("a.npy", (), "the collection has several features; give --feature, one of"),
        ("taken", (), "is there already"),
    ],
)
def test_what_cannot_be_written_is_said(job, tmp_path, name, words, message):
    (tmp_path / "taken").mkdir()
    told = called("export", job[0], tmp_path / name, *words, status=1)
    assert told.startswith("Error: ") and message in told
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_the_command_has_the_forms_of_the_library():
    from cce_torchrec.cli import export

    assert tuple(FORMS) == export.FORMS
