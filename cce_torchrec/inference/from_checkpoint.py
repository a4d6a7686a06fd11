"""Exports of a checkpoint's tables, without the model that was trained."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cce_torchrec.checkpoint.read_as import ReadAs
from cce_torchrec.checkpoint.rebuilt import Collection, load_collections, saved_collections
from cce_torchrec.checkpoint.whole_file import whole_file
from cce_torchrec.inference.collection import (
    InferenceEmbeddingBagCollection,
    InferenceEmbeddingCollection,
    inference_collection,
)
from cce_torchrec.inference.exported import to_exported_program, to_package, to_torchscript
from cce_torchrec.inference.folder import save_inference
from cce_torchrec.inference.onnx_file import to_onnx
from cce_torchrec.inference.sampled import compare
from cce_torchrec.inference.vectors import write_vectors

Served = InferenceEmbeddingBagCollection | InferenceEmbeddingCollection
FORMS = {
    "folder": ("",),
    "torchscript": (".pt",),
    "program": (".pt2",),
    "package": (".pt2",),
    "onnx": (".onnx",),
    "vectors": (".npy", ".parquet"),
}
"""With the suffixes that their names have; without one it is a folder."""


@dataclass(frozen=True, kw_only=True)
class ExportSaid:
    """What was written."""

    path: Path
    form: str
    collection: str
    features: list[str]
    """In the order in which ids come."""
    data_type: str
    bytes: int
    """Of the files that were written."""
    compared: str
    """What a comparison has found; empty where there was none."""


def export_checkpoint(
    folder: str | Path,
    out: str | Path,
    *,
    form: str | None = None,
    data_type: str | None = None,
    collection: str | None = None,
    feature: str | None = None,
    ignores: bool = False,
    read_as: ReadAs | None = None,
    check: bool = True,
) -> ExportSaid:
    """Writes the tables of one collection of a checkpoint for serving.

    Args:
        folder: see `checkpoint_info`; finalized or not.
        out: a folder or a file, which is not there yet.
        form: one of `FORMS`; None goes by the suffix of `out`, with "package" for .pt2.
        data_type: of rows; None is "fp32" for vectors, else "int8".
        collection: its path in the model, where there are several.
        feature: of vectors, where the collection has several.
        ignores: whether ids out of bounds are read as id 0; they are refused otherwise.
        read_as: see `saved_collections`.
        check: compare a sample of ids with the checkpoint; what differs is removed.

    Raises:
        ValueError: there is no such checkpoint, collection or feature, the form does not go with
            `out` or with sequences, `out` is there already, or what was written differs.
    """
    path = Path(out)
    form = _form(path, form)
    # Looked at first, as all that follows may take minutes.
    if path.exists():
        raise ValueError(f"{path} is there already; give another name, or remove it")
    data_type = data_type or ("fp32" if form == "vectors" else "int8")
    every = saved_collections(folder, read_as=read_as)
    chosen = _chosen({one.path: one for one in every}, collection, "collection", folder)
    if chosen.sequences and form not in ("folder", "vectors"):
        raise ValueError(
            f"collection {chosen.path!r} is of sequences, which are written as folder or vectors, "
            f"and not as {form}"
        )
    # Of the other collections nothing is read.
    trained = load_collections(folder, [chosen])[chosen.path]
    served = inference_collection(trained, data_type=data_type, ignores=ignores)
    key = _key(served, feature, form)
    _WRITERS[form](served, path, key)
    compared = ""
    if check:
        compared = _checked(path, form, trained, served, key)
    return ExportSaid(
        path=path,
        form=form,
        collection=chosen.path,
        features=served.inputs if form != "vectors" else [key],
        data_type=data_type,
        bytes=sum(file.stat().st_size for file in _files(path)),
        compared=compared,
    )


def _form(path: Path, form: str | None) -> str:
    if form is None:
        found = [name for name in FORMS if path.suffix in FORMS[name]]
        if not found:
            suffixes = [suffix for own in FORMS.values() for suffix in own if suffix]
            raise ValueError(f"{path}: write a folder without a suffix, or one of {suffixes}")
        return found[-1]
    if form not in FORMS:
        raise ValueError(f"form {form!r} is none of {list(FORMS)}")
    if path.suffix not in FORMS[form] and form != "folder":
        raise ValueError(f"{path}: the name of a {form} ends in {' or '.join(FORMS[form])}")
    return form


def _chosen(of: dict[str, Any], name: str | None, what: str, where: object) -> Any:
    """The one of that name, or the only one."""
    if name is None and len(of) == 1:
        return next(iter(of.values()))
    if name not in of:
        said = f"no {what} {name!r}" if name is not None else f"several {what}s"
        raise ValueError(f"{where} has {said}; give --{what}, one of {sorted(of)}")
    return of[name]


def _key(served: Served, feature: str | None, form: str) -> str:
    """The feature whose vectors are written; empty for other forms."""
    if form != "vectors":
        if feature is not None:
            raise ValueError("a feature is chosen for vectors; other forms have all of them")
        return ""
    keys = {one.key: one.key for one in served.packed.features}
    key: str = _chosen(keys, feature, "feature", "the collection")
    return key


def _checked(path: Path, form: str, trained: Collection, served: Served, key: str) -> str:
    try:
        return compare(path, form, trained, served, key)
    except BaseException:
        # Whoever finds a whole export would take it for a right one.
        for file in _files(path):
            file.unlink()
        if path.is_dir():
            shutil.rmtree(path)
        raise


def _files(path: Path) -> list[Path]:
    """What was written; tensors of a large ONNX are beside it."""
    # Whichever there are: a form has one file, a folder of some, or two.
    found = [path, path.with_name(f"{path.name}.data"), *path.glob("*")]
    return [file for file in found if file.is_file()]


def _torchscript(served: Any, path: Path, key: str) -> None:
    with whole_file(path) as writing:
        torch.jit.save(to_torchscript(served.lookup), str(writing))


def _program(served: Any, path: Path, key: str) -> None:
    with whole_file(path) as writing:
        torch.export.save(to_exported_program(served.lookup), writing)


_WRITERS: dict[str, Callable[[Any, Path, str], Any]] = {
    "folder": lambda served, path, key: save_inference(served, path),
    "torchscript": _torchscript,
    "program": _program,
    "package": lambda served, path, key: to_package(served.lookup, path),
    "onnx": lambda served, path, key: to_onnx(served, path),
    "vectors": lambda served, path, key: write_vectors(served, key, path),
}
