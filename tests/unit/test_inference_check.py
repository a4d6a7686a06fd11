"""An export beside what the trained model gave, in a process that has not trained it."""

import json
import struct
import subprocess
import sys
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from torchrec import KeyedJaggedTensor
from torchrec.models.dlrm import DLRM

from cce_torchrec import CCEEmbeddingBagCollection, CCEEmbeddingBagConfig, cluster
from cce_torchrec.inference import (
    TensorInputs,
    inference_collection,
    inference_model,
    save_inference,
    serve_check,
    to_exported_program,
    to_onnx,
    to_torchscript,
    write_examples,
)
from cce_torchrec.inference.examples import read_examples
from tests.support.inference import batch_of, many_tables, one_table


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A trained collection of every kind of table, its examples, and exports of it."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("checked")
    trained = many_tables()
    cluster(trained)
    served = inference_collection(trained, lookup="portable")
    save_inference(served, folder / "tables")
    to_torchscript(served.lookup).save(str(folder / "lookup.pt"))
    write_examples(folder / "examples.npz", trained, batch_of(trained, 70))
    return folder


@pytest.mark.parametrize("batch_size", [1, 32, 70, 500])
@pytest.mark.parametrize("export", ["tables", "lookup.pt"])
def test_an_export_gives_what_was_trained(made, export, batch_size):
    data = made / "examples.npz"
    report = serve_check.check_export(made / export, data, batch_size=batch_size)
    assert report.ok and report.rows == 70 and report.batch_size == min(batch_size, 70)
    assert 0 < report.difference <= report.tolerance  # int8
    assert "checksums" in report.verified and "right" in str(report)


def test_the_program_in_a_fresh_process(made, tmp_path):
    command = [sys.executable, "-m", "cce_torchrec.inference.serve_check", str(made / "tables")]
    command += ["--data", str(made / "examples.npz"), "--json", str(tmp_path / "found.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "70 examples in batches of 64: off by" in done.stdout and "a second" in done.stdout
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["ok"] and found["rows"] == 70 and found["versions"]["torch"]


def test_another_model_is_told(made, tmp_path, capsys):
    """By numbers, and where it has another shape."""
    torch.manual_seed(1)
    trained = many_tables()
    data = write_examples(tmp_path / "other.npz", trained, batch_of(trained, 5))
    with pytest.raises(SystemExit) as ended:
        serve_check.main([str(made / "tables"), "--data", str(data)])
    assert ended.value.code == 1 and "WRONG" in capsys.readouterr().out
    assert serve_check.check_export(made / "tables", data, tolerance=100.0).ok
    small = one_table()
    data = write_examples(tmp_path / "small.npz", small, batch_of(small, 5))
    with pytest.raises(SystemExit, match=r"serve_check: .* refuses the examples: .*lack g"):
        serve_check.main([str(made / "tables"), "--data", str(data)])
    served = inference_collection(one_table(embedding_dim=32), lookup="portable")
    to_torchscript(served.lookup).save(str(tmp_path / "wide.pt"))
    with pytest.raises(ValueError, match=r"gives \[5, 32\], .* gave \[5, 16\]: it is an export of"):
        serve_check.check_export(tmp_path / "wide.pt", data)


def test_a_small_table_does_not_hide_behind_a_large_one(tmp_path):
    """By the size of each feature, not of all."""
    config = {"num_embeddings": 100, "embedding_dim": 16, "num_rows": 8}
    trained = CCEEmbeddingBagCollection(
        [
            CCEEmbeddingBagConfig(name=name, feature_names=[name], **config)
            for name in ("big", "small")
        ]
    )
    ids = KeyedJaggedTensor(["big", "small"], torch.arange(20), lengths=torch.ones(20).int())
    with torch.no_grad():
        for chunk in range(4):
            trained.embedding_bags[f"big#{chunk}"].weight.mul_(100)
    data = write_examples(tmp_path / "examples.npz", trained, ids)
    right = save_inference(inference_collection(trained), tmp_path / "right")
    assert serve_check.check_export(right, data).ok
    with torch.no_grad():
        for chunk in range(4):
            trained.embedding_bags[f"small#{chunk}"].weight.zero_()
    wrong = save_inference(inference_collection(trained), tmp_path / "wrong")
    assert not serve_check.check_export(wrong, data).ok


def test_a_weighted_model_is_exported_with_its_weights(tmp_path):
    torch.manual_seed(0)
    tables = CCEEmbeddingBagCollection(
        [CCEEmbeddingBagConfig(name="f", num_embeddings=100, embedding_dim=16, num_rows=8)],
        is_weighted=True,
    )
    dlrm = DLRM(tables, 4, dense_arch_layer_sizes=[8, 16], over_arch_layer_sizes=[8, 1])
    ids = KeyedJaggedTensor(
        ["f"], torch.arange(9), torch.rand(9) + 0.5, lengths=torch.tensor([2, 0, 4, 3])
    )
    dense = torch.randn(4, 4)
    data = write_examples(tmp_path / "one.npz", dlrm, ids, dense, tolerance=1e-5)
    assert dlrm.training  # it was scored in evaluation, and left as it was
    packed = inference_model(dlrm, data_type="fp32", lookup="portable")
    model, example = (
        TensorInputs(packed, ["f"]),
        (dense, ids.values(), ids.lengths(), ids.weights()),
    )
    to_torchscript(model, example).save(str(tmp_path / "model.pt"))
    assert serve_check.check_export(tmp_path / "model.pt", data, batch_size=3).ok
    program = to_exported_program(model, example).module()
    torch.testing.assert_close(program(*example), dlrm.eval()(dense, ids))
    lookup = inference_collection(tables, lookup="portable").lookup
    assert to_exported_program(lookup).graph_signature.user_inputs[-1] == "weights"
    with pytest.raises(RuntimeError, match="do not add up to the values"):
        to_exported_program(lookup).module()(ids.values(), ids.lengths(), torch.ones(10))


def test_not_a_number_is_within_no_tolerance(made):
    report = serve_check.check_export(made / "tables", made / "examples.npz")
    assert not replace(report, difference=float("nan")).ok


@pytest.mark.parametrize("at", [0.3, 0.6, 0.9])
def test_damaged_files_are_told(made, tmp_path, at):
    """torch.jit.load takes flipped bytes without a word."""
    whole = (made / "lookup.pt").read_bytes()
    place = whole.index(b"data/0") + 200 if at == 0.3 else int(at * len(whole))
    flipped = bytearray(whole)
    flipped[place] ^= 0xFF
    for name, content in {"flipped.pt": flipped, "cut.pt": whole[:place]}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=r"damaged .*copy it again"):
            serve_check.check_export(tmp_path / name, made / "examples.npz")


def test_rows_of_a_parquet_file_are_scored(made, tmp_path):
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    served = inference_collection(one_table(), lookup="portable")
    folder = save_inference(served, tmp_path / "one")
    rows = pa.table({"f": [[1, 2], [], [3]], "unread": [0.5, 1.0, 2.0]})
    parquet.write_table(rows, tmp_path / "rows.parquet")
    report = serve_check.check_export(folder, tmp_path / "rows.parquet")
    assert report.difference is None and report.ok and "compared with nothing" in str(report)
    parquet.write_table(pa.table({"f": [1, 2]}), tmp_path / "single.parquet")
    assert read_examples(tmp_path / "single.parquet", ["f"]).lengths.tolist() == [1, 1]
    with pytest.raises(ValueError, match=r"lacks columns \['g'\]; it has \['f', 'unread'\]"):
        read_examples(tmp_path / "rows.parquet", ["f", "g"])
    with pytest.raises(ValueError, match=r"does not name its features; give an \.npz"):
        serve_check.check_export(made / "lookup.pt", tmp_path / "rows.parquet")
    for wrong in (["a"], [1.5], [[1.5]]):
        parquet.write_table(pa.table({"f": wrong}), tmp_path / "wrong.parquet")
        with pytest.raises(ValueError, match="are ids or lists of ids"):
            read_examples(tmp_path / "wrong.parquet", ["f"])
    parquet.write_table(pa.table({"f": pa.array([], pa.int64())}), tmp_path / "empty.parquet")
    with pytest.raises(ValueError, match="holds no examples"):
        read_examples(tmp_path / "empty.parquet", ["f"])


def test_weights_go_with_their_ids(tmp_path):
    trained = many_tables(is_weighted=True)
    served = inference_collection(trained, data_type="fp32", lookup="portable")
    folder = save_inference(served, tmp_path / "one")
    to_torchscript(served.lookup).save(str(tmp_path / "lookup.pt"))
    data = write_examples(tmp_path / "examples.npz", trained, batch_of(trained, 7), tolerance=1e-4)
    for export in (folder, tmp_path / "lookup.pt"):
        assert serve_check.check_export(export, data, batch_size=3).ok


def test_a_file_of_onnx_is_checked_too(made, tmp_path):
    pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    for weighted in (False, True):
        trained = many_tables(is_weighted=weighted)
        cluster(trained)
        file = to_onnx(inference_collection(trained), tmp_path / f"{weighted}.onnx")
        data = write_examples(tmp_path / f"{weighted}.npz", trained, batch_of(trained, 9))
        report = serve_check.check_export(file, data, batch_size=4)
        assert report.ok and "checksums are right" in report.verified
    whole = file.read_bytes()
    (tmp_path / "cut.onnx").write_bytes(whole[: len(whole) // 2])
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    (tmp_path / "flipped.onnx").write_bytes(flipped)
    for name in ("cut.onnx", "flipped.onnx"):
        with pytest.raises(ValueError, match=r"is damaged, or to_onnx did not write it; copy it"):
            serve_check.check_export(tmp_path / name, data)
    with pytest.raises(ValueError, match=r"of features \['f'\], and it takes \['f', 'g', "):
        small = write_examples(tmp_path / "small.npz", one_table(), batch_of(one_table(), 3))
        serve_check.check_export(file, small)


def test_bad_ids_are_refused_by_the_export(made, tmp_path):
    arrays = dict(np.load(made / "examples.npz"))
    arrays["values"][5] = -3
    np.savez(tmp_path / "bad.npz", **arrays)
    for export in ("tables", "lookup.pt"):
        with pytest.raises(ValueError, match=r"refuses the examples: .*id -3 is outside \[0, "):
            serve_check.check_export(made / export, tmp_path / "bad.npz")


def test_what_is_missing_is_said(made, tmp_path):
    data = made / "examples.npz"
    with pytest.raises(ValueError, match="is not there"):
        serve_check.check_export(tmp_path / "none", data)
    with pytest.raises(ValueError, match="is no file"):
        serve_check.check_export(made / "tables", tmp_path / "none.npz")
    (tmp_path / "one.txt").write_text("one")
    with pytest.raises(ValueError, match=r"is no folder and none of \['.pt', '.pt2', '.onnx'\]"):
        serve_check.check_export(tmp_path / "one.txt", data)
    with pytest.raises(ValueError, match=r"are read from \.npz and \.parquet"):
        serve_check.check_export(made / "tables", tmp_path / "one.txt")
    with pytest.raises(ValueError, match="batch_size 0 must be"):
        serve_check.check_export(made / "tables", data, batch_size=0)
    np.savez(tmp_path / "less.npz", features=np.array(["f"]), values=np.zeros(1, np.int64))
    with pytest.raises(ValueError, match=r"lacks \['expected', 'lengths', 'tolerance'\]"):
        serve_check.check_export(made / "tables", tmp_path / "less.npz")
    (tmp_path / "cut.npz").write_bytes(data.read_bytes()[:300])
    with pytest.raises(ValueError, match="holds no examples"):
        serve_check.check_export(made / "tables", tmp_path / "cut.npz")


def test_a_missing_library_is_named(made, tmp_path, monkeypatch):
    """Which, and how to get it; a process of its own knows no operator yet."""
    served = inference_collection(one_table(), lookup="auto")
    if type(served.lookup).__name__ != "FusedLookup":
        pytest.skip("there is no compiler for the fused lookup")
    to_torchscript(served.lookup).save(str(tmp_path / "fused.pt"))
    data = write_examples(tmp_path / "examples.npz", one_table(), batch_of(one_table(), 3))
    program = f"""
from cce_torchrec.inference import native, serve_check
native.problem.cache_clear()
native.library = lambda: (_ for _ in ()).throw(RuntimeError("no C++ compiler; install g++"))
serve_check.main([{str(tmp_path / "fused.pt")!r}, "--data", {str(data)!r}])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    assert "needs the library of the fused lookup: no C++ compiler; install g++" in done.stderr


def test_examples_that_cannot_be_written(tmp_path):
    trained, ids = one_table(), batch_of(one_table(), 3)
    other = KeyedJaggedTensor(["x"], ids.values(), lengths=ids.lengths())
    with pytest.raises(ValueError, match=r"lack \['f'\], which tables read"):
        write_examples(tmp_path / "one.npz", trained, other)
    with pytest.raises(ValueError, match="the model is packed; examples are of the one"):
        write_examples(tmp_path / "one.npz", inference_collection(trained), ids)
    with pytest.raises(ValueError, match="tolerance nan is no number"):
        write_examples(tmp_path / "one.npz", trained, ids, tolerance=float("nan"))
    with pytest.raises(ValueError, match=r"are written as \.npz"):
        write_examples(tmp_path / "one.csv", trained, ids)
    nothing = KeyedJaggedTensor(["f"], ids.values()[:0], lengths=ids.lengths()[:0])
    with pytest.raises(ValueError, match="one example or more"):
        write_examples(tmp_path / "one.npz", trained, nothing)
    with torch.no_grad():
        trained.embedding_bags["a#0"].weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN or infinite"):
        write_examples(tmp_path / "one.npz", trained, ids)
    assert not list(tmp_path.iterdir())


def test_neither_a_folder_nor_a_file_is_read(made):
    """A pipe, say, for whose writer it would wait."""
    with pytest.raises(ValueError, match="/dev/null is neither a folder nor a file"):
        serve_check.check_export("/dev/null", made / "examples.npz")


def test_an_array_whose_header_does_not_end_is_refused(made, tmp_path):
    """Python's tokenizer raises an error of its own."""
    with np.load(made / "examples.npz") as found:
        arrays = dict(found)
    np.savez(tmp_path / "examples.npz", **{k: v for k, v in arrays.items() if k != "values"})
    header = b"{'descr': (('<i8')  \n"
    with zipfile.ZipFile(tmp_path / "examples.npz", "a") as archive:
        archive.writestr(
            "values.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header
        )
    with pytest.raises(ValueError, match=r"examples\.npz holds no examples \([^\n]*\); write them"):
        read_examples(tmp_path / "examples.npz")
