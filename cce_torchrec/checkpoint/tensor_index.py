"""The index of a checkpoint's tensors: tensors.json, and what in it cannot be."""

from __future__ import annotations

import json
import math
import operator
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from cce_torchrec.checkpoint.manifest import Fingerprint

INDEX = "tensors.json"
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E5M2": torch.float8_e5m2, "F8_E4M3": torch.float8_e4m3fn, "C64": torch.complex64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
"""By the names that safetensors has for them."""


class Place(NamedTuple):
    """Where a shard is, and what."""

    file: str
    at: int
    """Byte of the file at which the shard starts."""
    shape: list[int]
    dtype: torch.dtype


def read_index(checkpoint: Path, files: dict[str, Fingerprint]) -> Metadata:
    """The index, as torch.distributed.checkpoint has it; its places are `Place`s, or objects.

    Args:
        checkpoint: its folder.
        files: those that the manifest names.

    Raises:
        ValueError: naming the tensor of which the index says what cannot be.
    """
    places: dict[MetadataIndex, Any] = {}
    tensors: dict[str, Any] = {}
    key = "as a whole"
    try:
        if INDEX not in files:
            raise ValueError(f"the manifest has no file {INDEX!r}")
        for key, entry in json.loads((checkpoint / INDEX).read_bytes()).items():
            tensors[key] = _entry(key, entry, files, places)
    except Exception as error:  # whatever a damaged one leads to
        raise ValueError(
            f"{checkpoint / INDEX} is damaged ({key}: {error}); load another checkpoint"
        ) from error
    return Metadata(tensors, storage_data=places)


def _entry(
    key: str,
    entry: dict[str, Any],
    files: dict[str, Fingerprint],
    places: dict[MetadataIndex, Any],
) -> TensorStorageMetadata | BytesStorageMetadata:
    """What the index says of a tensor or object, whose `places` are added."""
    if "object" in entry:
        places[MetadataIndex(key)] = entry["object"]
        return BytesStorageMetadata()
    dtype, shape, chunks = DTYPES[entry["dtype"]], torch.Size(entry["shape"]), []
    for shard in entry["shards"]:
        offsets, sizes = torch.Size(shard["offsets"]), torch.Size(shard["shape"])
        file, at = shard["file"], operator.index(shard["at"])
        inside = len(shape) == len(offsets) == len(sizes) and all(
            0 <= first <= first + size <= whole
            for first, size, whole in zip(offsets, sizes, shape, strict=True)
        )
        if not inside:
            raise ValueError(f"a shard of {list(sizes)} at {list(offsets)} is outside")
        if file not in files:
            raise ValueError(f"the manifest has no file {file!r}")
        if not 0 <= at <= files[file].size - math.prod(sizes) * dtype.itemsize:
            raise ValueError(f"{file} ends before the shard at byte {at}")
        chunks.append(ChunkStorageMetadata(offsets, sizes))
        places[MetadataIndex(key, offsets)] = Place(file, at, list(sizes), dtype)
    # What no shard holds would stay in the model as it was.
    held = sum(math.prod(chunk.sizes) for chunk in chunks)
    if held != math.prod(shape) or any(_overlap(*pair) for pair in combinations(chunks, 2)):
        raise ValueError(f"its shards do not make up {list(shape)}")
    return TensorStorageMetadata(TensorProperties(dtype=dtype), shape, chunks)


def _overlap(one: ChunkStorageMetadata, other: ChunkStorageMetadata) -> bool:
    """Whether two shards have an element in common."""
    return all(
        a < b + of_b and b < a + of_a
        for a, of_a, b, of_b in zip(one.offsets, one.sizes, other.offsets, other.sizes, strict=True)
    )
