"""The embeddings of ids by themselves: one, some, or all of a feature in a file, for retrieval."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cce_torchrec.bars import bar
from cce_torchrec.checkpoint.whole_file import whole_file
from cce_torchrec.inference.collection import (
    InferenceEmbeddingBagCollection,
    InferenceEmbeddingCollection,
    lookup_type,
)
from cce_torchrec.inference.lookup import PackedLookup

_BLOCK_BYTES = {".npy": 1 << 18, ".parquet": 1 << 24}
"""Vectors at once: as many as a write finds in the cache, which halved its time; a row group."""

Served = InferenceEmbeddingBagCollection | InferenceEmbeddingCollection


def vectors_of(served: Served, key: str, ids: torch.Tensor) -> torch.Tensor:
    """The embeddings float32 [ids, D] of `ids` [ids] of the feature `key`.

    Args:
        served: an inference collection; of one with `data_type="fp32"` they are as trained.
        key: name of a feature in its output.
        ids: int32 or int64, raw ones where the table hashes them.

    Raises:
        ValueError: an unknown `key`, or an id out of bounds.
    """
    ids = torch.as_tensor(ids).reshape(-1)
    return _lookup(served, key)(ids, torch.ones(len(ids), dtype=torch.int64))


def write_vectors(served: Served, key: str, path: str | Path) -> Path:
    """Writes the embeddings of all ids of the feature `key` into a file, and returns it.

    Args:
        path: `.npy`, float32 [ids, D], which `numpy.load(path, mmap_mode="r")` maps; or `.parquet`
            with columns `id` and `vector`, which needs pyarrow. It appears when it is whole.

    Raises:
        ValueError: an unknown `key`, raw ids, of which there is no list, another suffix, or a file
            that is there already.
    """
    path, number = Path(path), _number(served, key)
    feature = served.packed.features[number]
    if feature.raw_key is not None:
        raise ValueError(
            f"feature {key!r} has raw ids, any of 2^64; look up those that there are by vectors_of"
        )
    if path.suffix not in _WRITERS:
        raise ValueError(f"{path}: vectors are written as {' or '.join(_WRITERS)}")
    if path.exists():
        raise ValueError(f"{path} is there already; give another name, or remove it")
    shape = len(feature.ids), served.packed.tables[feature.table].dim
    blocks = blocks_of(served, key, _BLOCK_BYTES[path.suffix])
    with whole_file(path) as writing:
        _WRITERS[path.suffix](writing, blocks, shape)
    return path


def _number(served: Served, key: str) -> int:
    if not hasattr(served, "packed"):
        raise ValueError(
            f"{type(served).__name__} is no inference collection; make one by inference_collection"
        )
    keys = [feature.key for feature in served.packed.features]
    if key not in keys:
        raise ValueError(f"no feature {key!r}; the collection has {keys}")
    return keys.index(key)


def _lookup(served: Served, key: str) -> PackedLookup:
    """A lookup of the feature `key` alone."""
    packed = served.packed.only(_number(served, key))
    return lookup_type("auto")(packed)


def blocks_of(
    served: Served, key: str, nbytes: int = 1 << 20
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Ids and vectors of all ids of a feature, about `nbytes` of vectors at once.

    With a bar where a person is looking on.
    """
    lookup = _lookup(served, key)
    count = len(served.packed.features[_number(served, key)].ids)
    size = max(16, nbytes // (4 * lookup.total_dim))
    shown = bar(count, key, "id")
    ones = torch.ones(min(count, size), dtype=torch.int64)
    for first in range(0, count, size):
        ids = torch.arange(first, min(first + size, count))
        yield ids, lookup(ids, ones[: len(ids)])
        shown.update(len(ids))
    shown.close()


def _write_npy(path: Path, blocks: Iterator[Any], shape: tuple[int, int]) -> None:
    # Not through a map of the file, whose pages would count as memory until they are written.
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for _, vectors in blocks:
            file.write(vectors.numpy().data)


def _write_parquet(path: Path, blocks: Iterator[Any], shape: tuple[int, int]) -> None:
    try:
        pa: Any = importlib.import_module("pyarrow")
        parquet: Any = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise ValueError(
            "vectors in parquet need pyarrow; pip install 'cce-torchrec[data]', or write .npy"
        ) from error
    kind = pa.list_(pa.float32(), shape[1])
    schema = pa.schema([("id", pa.int64()), ("vector", kind)])
    # Values do not repeat, so that compression and dictionaries would cost time for nothing.
    with parquet.ParquetWriter(path, schema, compression="none", use_dictionary=False) as writer:
        for ids, vectors in blocks:
            rows = pa.FixedSizeListArray.from_arrays(vectors.numpy().reshape(-1), shape[1])
            writer.write_batch(pa.record_batch([pa.array(ids.numpy()), rows], schema=schema))


_WRITERS = {".npy": _write_npy, ".parquet": _write_parquet}
