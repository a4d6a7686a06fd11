"""Writes a packed collection as a file of ONNX, and looks whether ONNX Runtime reads the same."""

from __future__ import annotations

import importlib
import logging
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cce_torchrec.checkpoint.location import fingerprint, sync_folder, write
from cce_torchrec.checkpoint.whole_file import folder_beside
from cce_torchrec.inference.collection import InferenceEmbeddingBagCollection, lookup_type
from cce_torchrec.inference.onnx_graph import Arrays, lookup_graph
from cce_torchrec.inference.onnx_nodes import onnx_package
from cce_torchrec.inference.packed_tables import PackedTables
from cce_torchrec.reasons import first_line

logger = logging.getLogger(__name__)

_MOST_INSIDE = 1 << 30
"""Bytes of tensors in the file itself; a message of protobuf has at most twice as many."""
_PAGE = 1 << 16
"""Bytes, of which the pages of any system are parts."""
NO_CHECKSUM = b"cce_torchrec crc32 00000000"
DATA_CHECKSUM = b"cce_torchrec data crc32 "
_TOLERANCE = 1e-5
"""Of what ONNX Runtime gives, in parts of the largest value: it adds up in another order."""


def to_onnx(collection: InferenceEmbeddingBagCollection, path: str | Path) -> Path:
    """Writes the lookup of `collection` as a file of ONNX (opset 18), and returns the file.

    Its inputs are `values` int64 [V], ids feature by feature in the order of `collection.inputs`;
    `lengths` int64 [features * B] of their bags; and, where the collection is weighted, `weights`
    float32 [V]. Its output `pooled` is float32 [B, sum of D], and equals that of
    `collection.lookup` but for rounding. B and V may be any, 0 included. Names of inputs and
    outputs, and the dimensions of these, are among the file's metadata as JSON: `inputs`, `keys`
    and `dims`.

    Codes are unpacked, to 8, 16 or 32 bits, and 4-bit values of rows to 8. Above 1 GiB tensors are
    in a second file, `path` with `.data` behind it, which has to stay beside the first.

    An id out of bounds is read as id 0 if the collection ignores these. Otherwise ONNX Runtime
    raises, with the table, the feature and its range.

    Before the file has its name it is checked by `onnx`, and, if `onnxruntime` is installed, some
    ids are looked up and compared, for which it is loaded into memory.

    Raises:
        ValueError: `onnx` is not installed; `collection` is one of sequences, or no inference
            collection; `path` does not end in .onnx, is there already, or cannot be written; or
            ONNX Runtime gives other values than the collection. Nothing is left behind.
    """
    _refuse_others(collection)
    path = Path(path)
    if path.suffix != ".onnx":
        raise ValueError(f"{path}: the name of the file has to end in .onnx")
    data = path.with_name(f"{path.name}.data")
    for file in (path, data):
        if file.exists():
            raise ValueError(f"{file} is there already; give another name, or remove it")
    model, arrays = lookup_graph(collection.packed, collection.ignores)
    # A folder, in which both files have the names by which one knows the other.
    with folder_beside(path) as writing:
        if sum(array.nbytes for array in arrays.values()) > _MOST_INSIDE:
            crc = _write_beside(model, arrays, writing / data.name)
            model.metadata_props.add(key="data", value=f"{DATA_CHECKSUM.decode()}{crc:08x}")
        else:
            _put_inside(model, arrays)
        model.metadata_props.add(key="checksum", value=NO_CHECKSUM.decode())
        write(writing / path.name, [with_checksum(model.SerializeToString())])
        del model, arrays  # of which the runtime makes its own
        _check(collection, writing / path.name)
        _rename([writing / data.name, writing / path.name], path.parent)
        sync_folder(path.parent)
    return path


def with_checksum(model: bytes) -> bytes:
    """`model` with the checksum of all its bytes, those of the checksum being zeros, in its place.

    The format has none, and runtimes read flipped bytes without a word.
    """
    start, _, end = model.rpartition(NO_CHECKSUM)
    return start + NO_CHECKSUM[:-8] + b"%08x" % zlib.crc32(model) + end


def verify_onnx(file: Path) -> None:
    """Compares a file that `to_onnx` wrote, and the one with its tensors, with their checksums.

    Raises:
        ValueError: either is damaged, cut short or of another model.
    """
    model, mark = file.read_bytes(), NO_CHECKSUM[:-8]
    start, found, end = model.rpartition(mark)
    bare = start + NO_CHECKSUM + end[8:]
    if not found or end[:8] != b"%08x" % zlib.crc32(bare):
        raise ValueError(f"{file} is damaged, or to_onnx did not write it; copy it again")
    _, beside, end = start.rpartition(DATA_CHECKSUM)
    data = file.with_name(f"{file.name}.data")
    if not beside:
        return
    if not data.is_file() or end[:8] != b"%08x" % fingerprint(data).crc:
        raise ValueError(f"{data} is missing, damaged, or of another model; copy both again")


def _refuse_others(collection: Any) -> None:
    if isinstance(collection, InferenceEmbeddingBagCollection):
        return
    name = type(collection).__name__
    if hasattr(collection, "lookups"):
        raise ValueError(
            f"{name}: sequences have no form in ONNX here, only collections of bags do; export "
            "each of its lookups by to_torchscript, whose bags are single ids"
        )
    raise ValueError(
        f"{name} is no inference collection; make one by inference_collection. Whole models have "
        "no form in ONNX here: export their collections"
    )


def _put_inside(model: Any, arrays: Arrays) -> None:
    for tensor in model.graph.initializer:
        if tensor.name in arrays:
            tensor.raw_data = arrays[tensor.name].tobytes()


def _write_beside(model: Any, arrays: Arrays, file: Path) -> int:
    """Writes all arrays into a file, and into the model where each of them is in it.

    Returns its checksum.
    """
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    parts, at = [], 0
    for name, array in arrays.items():
        tensor = tensors[name]
        tensor.data_location = tensor.EXTERNAL
        for key, value in (("location", file.name), ("offset", at), ("length", array.nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        # From a page on, so that a runtime may map it.
        parts += [array.reshape(-1).view(np.uint8), np.zeros(-array.nbytes % _PAGE, np.uint8)]
        at += sum(map(len, parts[-2:]))
    return write(file, parts).crc


def _rename(files: list[Path], folder: Path) -> None:
    """Gives `files` their names in `folder`: the last only when it has those before it."""
    done: list[Path] = []
    try:
        for file in files:
            if (folder / file.name).exists():  # by another process, since it was looked for
                raise FileExistsError(f"{folder / file.name} is there by now")
            if file.exists():
                done.append(folder / file.name)
                os.rename(file, done[-1])
    except OSError:
        for file in done:
            file.unlink(missing_ok=True)
        raise


def _check(collection: InferenceEmbeddingBagCollection, file: Path) -> None:
    """Checks the form of a written file, and compares its values with those of `collection`.

    Raises:
        ValueError: ONNX Runtime cannot run it, or gives other values.
    """
    onnx_package().checker.check_model(str(file))
    try:
        runtime: Any = importlib.import_module("onnxruntime")
    except ImportError:
        logger.warning(
            "%s: onnxruntime is not installed, so its values are not compared", file.name
        )
        return
    batch = _batch(collection.packed)
    # Of a lookup for CPUs, whatever the collection's own is for.
    own = lookup_type("auto")(collection.packed, collection.ignores)
    expected = own(*batch)
    options = runtime.SessionOptions()
    options.log_severity_level = 4  # what goes wrong is raised
    names = ("values", "lengths", "weights")
    tensors = {n: t.numpy() for n, t in zip(names, batch, strict=True) if t is not None}
    try:
        session = runtime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        found = torch.from_numpy(session.run(["pooled"], tensors)[0])
    except Exception as error:  # its classes are not the same in all versions
        why = first_line(error)
        raise ValueError(
            f"{file.name}: ONNX Runtime {runtime.__version__} does not run it ({why}); versions "
            "1.21 to 1.32 were tested"
        ) from error
    off = float((found - expected).abs().amax())
    # Not a number is not within any tolerance.
    if not off <= _TOLERANCE * max(1e-30, float(expected.abs().amax())):
        raise ValueError(
            f"{file.name}: ONNX Runtime {runtime.__version__} gives values that are off by "
            f"{off:.2g}, so the file was removed; versions 1.21 to 1.32 were tested"
        )


def _batch(packed: PackedTables) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Values, lengths and weights of three bags a feature, of two ids, none and one."""
    values: list[int] = []
    for name in packed.inputs:
        own = [feature for feature in packed.features if feature.feature == name]
        # Ids that all tables have which read them.
        sizes = [len(feature.ids) for feature in own if feature.raw_key is None]
        count = min(sizes, default=1 << 62)
        values += [0, count - 1, count // 2]
    lengths = torch.tensor([2, 0, 1] * len(packed.inputs))
    weights = torch.linspace(0.5, 1.5, len(values)) if packed.is_weighted else None
    return torch.tensor(values), lengths, weights
