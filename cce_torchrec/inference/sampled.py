"""An export beside what it was made of: a sample of ids of every feature."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cce_torchrec.checkpoint.rebuilt import Collection
from cce_torchrec.inference.collection import (
    InferenceEmbeddingBagCollection,
    InferenceEmbeddingCollection,
    inference_collection,
)
from cce_torchrec.inference.examples import Examples
from cce_torchrec.inference.folder import load_inference
from cce_torchrec.inference.serve_check import load_export
from cce_torchrec.inference.vectors import vectors_of

Served = InferenceEmbeddingBagCollection | InferenceEmbeddingCollection
SAMPLE = 64
"""Ids of each feature."""
TOLERANCES = {"fp32": 1e-5, "fp16": 2e-3, "int8": 0.02, "int4": 0.25}
"""In parts of a feature's largest value: an integer of 4 bits is off by a thirtieth of the range of
its row, and main and helper rows may be larger than their sum."""


def compare(path: Path, form: str, trained: Collection, served: Served, key: str = "") -> str:
    """Compares an export with what `trained` gives for a sample of ids; what was found, to print.

    Args:
        path: of the export.
        form: one of `from_checkpoint.FORMS`.
        trained: what it was made of.
        served: that, packed.
        key: feature of vectors.

    Raises:
        ValueError: a feature differs by more than rows of its type may, or the export cannot be
            loaded.
    """
    part = TOLERANCES[served.packed.tables[0].row_type.name]
    worst = (0.0, 0.0, "")
    for feature, found, expected in _pairs(path, form, trained, served, key):
        # Each by itself, as a wrong small table must not hide behind a large one.
        allowed = part * max(1e-30, float(expected.abs().max()))
        off = float((found.float() - expected).abs().nan_to_num(nan=torch.inf).max())
        if off > allowed:
            raise ValueError(
                f"{path} is not what was trained: feature {feature!r} is off by {off:.3g}, and "
                f"{allowed:.3g} may be"
            )
        worst = max(worst, (off / allowed, off, feature))
    return (
        f"compared {SAMPLE} ids of each feature with the checkpoint: off by {worst[1]:.3g} where "
        f"it is worst ({worst[2]}), {worst[0]:.0%} of what may be"
    )


def _pairs(
    path: Path, form: str, trained: Collection, served: Served, key: str
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Feature, what the export gives for its sample, and what it should be."""
    if form != "vectors" and isinstance(served, InferenceEmbeddingBagCollection):
        yield from _pooled(path, form, trained, served)
        return
    exact = inference_collection(trained, data_type="fp32")
    loaded = None if form == "vectors" else load_inference(path)
    for one in exact.packed.features:
        if loaded is None and one.key != key:
            continue
        ids = _ids(exact, one.feature)
        found = _read_vectors(path, ids) if loaded is None else vectors_of(loaded, one.key, ids)
        yield one.key, found, vectors_of(exact, one.key, ids)


def _pooled(
    path: Path, form: str, trained: Any, served: InferenceEmbeddingBagCollection
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """The same of bags of one id each, by what a server would load."""
    values = torch.cat([_ids(served, feature) for feature in served.inputs])
    # By unequal weights, so that a pooling that leaves them out is seen.
    weights = torch.linspace(0.5, 1.5, len(values)) if served.weighted else None
    batch = Examples(
        features=served.inputs,
        values=values,
        lengths=torch.ones(len(values), dtype=torch.int64),
        weights=weights,
    )
    with torch.no_grad():
        if form == "program":
            found = torch.export.load(path).module()(*batch.tensors)
        else:
            found = load_export(path, "auto")[0](batch)
        expected = trained(batch.keyed)
    dims = expected.length_per_key()
    parts = found.split(dims, dim=1), expected.values().float().split(dims, dim=1)
    yield from zip(expected.keys(), *parts, strict=True)


def _ids(served: Served, feature: str) -> torch.Tensor:
    """A sample of the ids of a feature, the first and the last among them."""
    own = [one for one in served.packed.features if one.feature == feature]
    # Of the smallest table that reads it; raw ids may be any.
    most = min(1 << 40 if one.raw_key is not None else len(one.ids) for one in own)
    ids = torch.randint(most, (SAMPLE,), generator=torch.Generator().manual_seed(0))
    ids[0], ids[1] = 0, most - 1
    return ids


def _read_vectors(path: Path, ids: torch.Tensor) -> torch.Tensor:
    if path.suffix == ".npy":
        return torch.from_numpy(np.load(path, mmap_mode="r")[ids.numpy()])
    parquet: Any = importlib.import_module("pyarrow.parquet")
    column = parquet.read_table(path, memory_map=True).column("vector")
    # Of all vectors only the sample becomes numbers of Python's.
    return torch.tensor(column.take(ids.numpy()).to_pylist())
