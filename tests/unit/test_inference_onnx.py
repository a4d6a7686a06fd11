"""Packed tables as files of ONNX, run by ONNX Runtime and compared with the packed collection."""

import importlib
import json

import numpy as np
import pytest
import torch
from torchrec import EmbeddingConfig

from cce_torchrec import CCEEmbeddingCollection, cluster
from cce_torchrec.codes.hashing import HashFunction, mix
from cce_torchrec.inference import inference_collection, onnx_file, onnx_graph, onnx_nodes, to_onnx
from cce_torchrec.inference.packed_tables import PackedTables
from cce_torchrec.inference.row_types import ROW_TYPES
from cce_torchrec.packing import CodePacking
from tests.support.inference import LIMITS, batch_of, many_tables, one_table, tensors, trained

onnx = pytest.importorskip("onnx", reason="needs the package onnx")
runtime = pytest.importorskip("onnxruntime", reason="needs the package onnxruntime")


def run(path, values, lengths, weights=None, threads=1):
    """What ONNX Runtime gives for a batch, with all threads at hand if `threads` is 0."""
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # errors are raised, and need no second line
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    tensors = {"values": values, "lengths": lengths, "weights": weights}
    inputs = {name: tensor.numpy() for name, tensor in tensors.items() if tensor is not None}
    return torch.from_numpy(session.run(["pooled"], inputs)[0])


def packed(collection, **kwargs):
    return inference_collection(collection, lookup="portable", **kwargs)


@pytest.fixture(scope="module")
def served():
    """A clustered collection of every kind of table."""
    return packed(trained(False, "clustered"))


@pytest.fixture(scope="module")
def written(served, tmp_path_factory):
    return to_onnx(served, tmp_path_factory.mktemp("written") / "lookup.onnx")


@pytest.mark.parametrize("data_type", ["fp32", "fp16", "int8", "int4"])
@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize("stage", ["fresh", "clustered", "finalized"])
def test_the_runtime_gives_what_the_collection_gives(stage, is_weighted, data_type, tmp_path):
    collection = trained(is_weighted, stage)
    served = packed(collection, data_type=data_type)
    path = to_onnx(served, tmp_path / "lookup.onnx")
    for num_bags in (0, 1, 2, 33):
        batch = tensors(batch_of(collection, num_bags, seed=num_bags))
        # Of another order of summands alone: values are below .5.
        found, expected = run(path, *batch), served.lookup(*batch)
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-7)


@pytest.mark.parametrize("threads", [1, 8])
def test_bags_of_any_length_are_added_up(threads, tmp_path):
    collection = one_table()
    cluster(collection)
    served = packed(collection)
    path = to_onnx(served, tmp_path / "one.onnx")
    # Around powers of 2, at which the halving of bags has another round; first and last are empty.
    lengths = torch.tensor([0, 1, 2, 3, 4, 5, 7, 8, 9, 0, 0, 100, 1, 4097, 0])
    values = torch.randint(0, 1000, (int(lengths.sum()),))
    # In float64, as thousands of summands one by one round more than pairs of them do.
    vectors = served.lookup(values, torch.ones_like(values)).double()
    expected = torch.zeros(len(lengths), 16).double()
    expected.index_add_(0, torch.repeat_interleave(lengths), vectors)
    for _ in range(3):
        found = run(path, values, lengths, threads=threads)
        torch.testing.assert_close(found, expected.float(), rtol=1e-6, atol=1e-6)


def test_empty_bags_are_zeros_and_one_id_is_enough(served, written):
    count = len(served.inputs)
    lengths = torch.zeros(count * 3, dtype=torch.int64)
    assert not run(written, lengths[:0], lengths).any()
    lengths[4] = 1
    values = torch.tensor([7])
    found = run(written, values, lengths)
    torch.testing.assert_close(found, served.lookup(values, lengths), rtol=0, atol=1e-7)


def test_raw_ids_are_any_integers(served, written):
    values = torch.tensor([-1, 0, -(2**63), 2**63 - 1, 333, 1 << 40])
    lengths = torch.zeros(len(served.inputs), len(values), dtype=torch.int64)
    lengths[served.inputs.index("raw")] = 1
    lengths = lengths.view(-1)
    found = run(written, values, lengths)
    torch.testing.assert_close(found, served.lookup(values, lengths), rtol=0, atol=1e-7)


def one_id(served, feature, value):
    """A batch of one row and one id."""
    lengths = torch.tensor([int(name == feature) for name in served.inputs])
    return torch.tensor([value]), lengths


@pytest.mark.parametrize("feature", ["f", "g", "h", "q", "x", "y"])
@pytest.mark.parametrize("side", ["below", "above", "far"])
def test_ids_out_of_bounds_are_refused_by_name(served, written, feature, side):
    limit = LIMITS[feature]
    value = {"below": -1, "above": limit, "far": -(2**63)}[side]
    values, lengths = one_id(served, feature, value)
    # `g` has other bounds in each of two tables, of which either may be named.
    match = rf"table '\w+', feature '{feature}': an id is outside \[0, "
    with pytest.raises(Exception, match=match):
        run(written, values, lengths)
    values[0] = limit - 1
    expected = served.lookup(values, lengths)
    torch.testing.assert_close(run(written, values, lengths), expected, rtol=0, atol=1e-7)


def test_ids_out_of_bounds_are_read_as_id_0_where_they_are_ignored(tmp_path):
    torch.manual_seed(0)
    collection = many_tables()
    cluster(collection)
    served = packed(collection, ignores=True)
    path = to_onnx(served, tmp_path / "ignores.onnx")
    for feature in ("f", "g", "h", "q", "x", "y"):
        zero = served.lookup(*one_id(served, feature, 0))
        for value in (-1, 1000, -(2**63), 2**63 - 1):
            found = run(path, *one_id(served, feature, value))
            torch.testing.assert_close(found, zero, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("values", "lengths"),
    [
        ([1, 2, 3], [1, 1]),  # fewer counted than given
        ([1], [1, 1]),  # more
        ([1, 2], [3, -1]),
        ([1, 2], [-1, 3]),
        ([1, 2], [2**62, 2**62]),
    ],
)
def test_lengths_that_do_not_fit_are_refused(values, lengths, tmp_path):
    path = to_onnx(packed(one_table()), tmp_path / "one.onnx")
    with pytest.raises(Exception, match="ONNXRuntimeError"):
        run(path, torch.tensor(values), torch.tensor(lengths))


def test_lengths_are_those_of_all_features(served, written):
    lengths = torch.zeros(len(served.inputs) + 1, dtype=torch.int64)
    with pytest.raises(Exception, match="lengths of 7 features"):
        run(written, lengths[:0], lengths)


def test_weights_are_one_for_each_id(tmp_path):
    collection = trained(True, "clustered")
    path = to_onnx(packed(collection), tmp_path / "weighted.onnx")
    values, lengths, weights = tensors(batch_of(collection, 4))
    with pytest.raises(Exception, match="weights of 7 features"):
        run(path, values, lengths, weights[:-1])


def test_hashes_are_those_of_training():
    """The runtime's uint64 is ours: it wraps around, and its shifts bring zeros in."""
    graph = onnx_graph.Graph()
    function = HashFunction(-0x123456789ABCDEF1, 2**63 - 5)
    hashes = np.array([[function.multiplier], [function.addend]]).view(np.uint64)
    mixed = onnx_graph.mixed(graph, graph.cast("ids", "UINT64"))
    rows = onnx_graph.hashed(graph, onnx_nodes.column(graph, mixed), hashes, 2**31 - 1)
    int64 = graph.types.INT64
    outputs = [graph.value_info(graph.cast(mixed, "INT64"), int64, ["ids"])]
    outputs.append(graph.value_info(rows, int64, ["ids", 1]))
    inputs = [graph.value_info("ids", int64, ["ids"])]
    made = onnx.helper.make_graph(graph.nodes, "g", inputs, outputs, list(graph.tensors.values()))
    opset = onnx.helper.make_opsetid("", onnx_graph.OPSET)
    model = onnx.helper.make_model(made, opset_imports=[opset], ir_version=8)
    ids = torch.cat([torch.randint(-(2**63), 2**63 - 1, (1000,)), torch.tensor([0, -1, -(2**63)])])
    session = runtime.InferenceSession(model.SerializeToString())
    found = session.run(None, {"ids": ids.numpy()})
    assert found[0].tolist() == mix(ids).tolist()
    assert found[1][:, 0].tolist() == function(ids, 2**31 - 1).tolist()


@pytest.mark.parametrize(
    ("num_rows", "kind"),
    [(2, np.uint8), (256, np.uint8), (257, np.uint16), (65536, np.uint16), (65537, np.int32)],
)
def test_codes_are_unpacked_to_the_smallest_type(num_rows, kind, monkeypatch):
    monkeypatch.setattr(onnx_graph, "_BLOCK", 16)  # of 100 ids several blocks, the last cut short
    codes = torch.randint(0, num_rows, (100, 3))
    codes[5, 1] = num_rows - 1
    packing = CodePacking.of_rows(num_rows)
    stream = packing.pack(codes.view(-1, 1)).view(-1)[: -(-300 * packing.bits // 8)]
    table = PackedTables.of(one_table(), ROW_TYPES["fp32"]).tables[0]
    values = dict(vars(table)) | {
        "num_embeddings": 100,
        "num_chunks": 3,
        "num_rows": num_rows,
        "code_bits": packing.bits,
    }
    found = onnx_graph.unpacked_codes(type(table)(**values), stream)
    assert found.dtype == kind
    assert found.tolist() == codes.tolist()


def test_the_file_says_what_its_inputs_and_outputs_are(served, written):
    model = onnx.load(str(written))
    props = {own.key: own.value for own in model.metadata_props}
    assert props.pop("checksum").startswith("cce_torchrec crc32 ")
    told = {key: json.loads(value) for key, value in props.items()}
    assert told == {"inputs": served.inputs, "keys": served.keys, "dims": served.dims}
    assert [own.name for own in model.graph.input] == ["values", "lengths"]
    onnx.checker.check_model(str(written), full_check=True)


def test_large_tables_are_in_a_second_file(served, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_file, "_MOST_INSIDE", 1000)
    path = to_onnx(served, tmp_path / "folder" / "lookup.onnx")
    names = sorted(file.name for file in path.parent.iterdir())
    assert names == ["lookup.onnx", "lookup.onnx.data"]
    batch = torch.tensor([7]), torch.tensor([1, 0, 0, 0, 0, 0, 0])
    torch.testing.assert_close(run(path, *batch), served.lookup(*batch), rtol=0, atol=1e-7)
    path.unlink()
    with pytest.raises(ValueError, match=r"lookup.onnx.data is there already; give another name"):
        to_onnx(served, path)


def test_files_that_cannot_be_written_are_refused(served, written, tmp_path):
    with pytest.raises(ValueError, match=r"lookup.onnx is there already; give another name"):
        to_onnx(served, written)
    with pytest.raises(ValueError, match=r"the name of the file has to end in .onnx"):
        to_onnx(served, tmp_path / "lookup.pt")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot be written"):
        to_onnx(served, tmp_path / "file" / "lookup.onnx")


def test_a_runtime_that_gives_other_values_is_refused(tmp_path, monkeypatch):
    served = packed(one_table(), data_type="fp32")
    off = lambda *batch: served.lookup(*batch) * 1.0001  # noqa: E731
    monkeypatch.setattr(onnx_file, "lookup_type", lambda kind: lambda packed, ignores: off)
    with pytest.raises(ValueError, match=r"gives values that are off by .* the file was removed"):
        to_onnx(served, tmp_path / "lookup.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("large", [False, True])
def test_nothing_is_left_when_writing_fails(large, tmp_path, monkeypatch):
    rename = onnx_file.os.rename

    def full(source, target):
        if str(target).endswith(".onnx"):
            raise OSError("no space left")
        rename(source, target)

    monkeypatch.setattr(onnx_file, "_MOST_INSIDE", 1000 if large else 1 << 30)
    monkeypatch.setattr(onnx_file.os, "rename", full)
    with pytest.raises(ValueError, match=r"cannot be written \(no space left\)"):
        to_onnx(packed(one_table()), tmp_path / "lookup.onnx")
    assert not list(tmp_path.iterdir())


def without(monkeypatch, package):
    load = importlib.import_module

    def refusing(name, *rest):
        if name.split(".")[0] == package:
            raise ImportError(name)
        return load(name, *rest)

    monkeypatch.setattr(importlib, "import_module", refusing)


def test_a_missing_package_is_named_with_its_extra(monkeypatch, tmp_path):
    without(monkeypatch, "onnx")
    with pytest.raises(ValueError, match=r"needs the package onnx; pip install .*\[serving\]"):
        to_onnx(packed(one_table()), tmp_path / "lookup.onnx")
    assert not list(tmp_path.iterdir())


def test_without_a_runtime_values_are_not_compared_and_it_is_said(monkeypatch, tmp_path, caplog):
    without(monkeypatch, "onnxruntime")
    path = to_onnx(packed(one_table()), tmp_path / "lookup.onnx")
    assert path.exists()
    assert "onnxruntime is not installed, so its values are not compared" in caplog.text


def test_sequences_and_other_modules_are_refused(tmp_path):
    tables = [EmbeddingConfig(name="a", num_embeddings=10, embedding_dim=4, feature_names=["f"])]
    sequences = packed(CCEEmbeddingCollection(tables))
    with pytest.raises(ValueError, match="sequences have no form in ONNX here"):
        to_onnx(sequences, tmp_path / "lookup.onnx")
    with pytest.raises(ValueError, match="CCEEmbeddingBagCollection is no inference collection"):
        to_onnx(one_table(), tmp_path / "lookup.onnx")
