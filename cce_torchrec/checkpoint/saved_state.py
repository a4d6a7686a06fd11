"""Tensors of a checkpoint that are read by the block, without a model that they would go into."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem

from cce_torchrec.checkpoint import format_2
from cce_torchrec.checkpoint.manifest import Manifest
from cce_torchrec.checkpoint.tensor_files import TensorReader

BLOCK_BYTES = 1 << 25
"""Most that a block of rows takes, or one row of a tensor that is wider."""
_GROUP = 8
"""Rows at whose multiples blocks begin."""


class SavedState:
    """The tensors of one checkpoint, of any world size and plan; nothing is kept in memory.

    Args:
        checkpoint: its folder.
        manifest: what `read_manifest` gave.

    Raises:
        ValueError: its index is missing or damaged.
    """

    def __init__(self, checkpoint: Path, manifest: Manifest) -> None:
        self.manifest = manifest
        reader = format_2.Format2Reader if manifest.is_format_2 else TensorReader
        self._reader: Any = reader(checkpoint, manifest.files, {})
        metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(metadata, True)
        self._places = metadata.storage_data
        entries = metadata.state_dict_metadata
        self.tensors: dict[str, TensorStorageMetadata] = {
            key: entry for key, entry in entries.items() if isinstance(entry, TensorStorageMetadata)
        }
        """Type, shape and shards by key: `model.NAME`, or `optimizer.PARAMETER.STATE`."""
        self.objects: dict[str, Any] = {
            key: None if manifest.is_format_2 else self._places[MetadataIndex(key)]
            for key in entries
            if key not in self.tensors
        }
        """Extra state of modules; None where only a pickle has it (format 2)."""
        self._whole: tuple[str, torch.Tensor] | None = None

    def shape(self, key: str) -> tuple[int, ...]:
        """Of a tensor."""
        return tuple(self.tensors[key].size)

    def dtype(self, key: str) -> torch.dtype:
        """Of a tensor."""
        return self.tensors[key].properties.dtype

    def nbytes(self, key: str) -> int:
        """Bytes of a tensor."""
        return math.prod(self.shape(key)) * self.dtype(key).itemsize

    def files(self, key: str) -> set[str]:
        """Names of the files that a tensor is in."""
        found = [self._places[MetadataIndex(key, c.offsets)] for c in self.tensors[key].chunks]
        name = "relative_path" if self.manifest.is_format_2 else "file"
        return {getattr(place, name) for place in found}

    def whole(self, key: str) -> torch.Tensor:
        """All of a tensor."""
        size = self.shape(key)
        return self.rows(key, 0, size[0]) if size else self._read(key, 0, 0)

    def rows(self, key: str, first: int, last: int) -> torch.Tensor:
        """Rows [first, last) of a tensor that has rows, put together from its shards.

        Raises:
            ValueError, OSError: a file is missing or too short.
        """
        if not self.manifest.is_format_2:
            return self._read(key, first, last)
        # torch reads whole shards, and would read each again for every block.
        if self._whole is None or self._whole[0] != key:
            self._whole = key, self._read(key, 0, self.shape(key)[0])
        return self._whole[1][first:last]

    def blocks(self, key: str) -> Iterator[tuple[int, torch.Tensor]]:
        """First row and values of the blocks of a tensor that has rows."""
        rows, width = self.shape(key)[0], self.nbytes(key) // max(1, self.shape(key)[0])
        # Of packed codes any row begins a group of ids; of whole ones every eighth.
        size = max(1, BLOCK_BYTES // max(1, width) // _GROUP) * _GROUP
        for first in range(0, rows, size):
            yield first, self.rows(key, first, min(rows, first + size))

    def _read(self, key: str, first: int, last: int) -> torch.Tensor:
        size = self.tensors[key].size
        shape = [last - first, *size[1:]] if size else []
        out = torch.empty(shape, dtype=self.dtype(key), device="cpu")
        # As loads have it: what to read of which shard, and where to put it.
        items = []
        for chunk in self.tensors[key].chunks:
            begins, sizes = list(chunk.offsets), list(chunk.sizes)
            into = list(begins)
            skipped = [0] * len(begins)
            if begins:
                low, high = max(first, begins[0]), min(last, begins[0] + sizes[0])
                if low >= high:
                    continue
                skipped[0], into[0], sizes[0] = low - begins[0], low - first, high - low
            items.append(
                ReadItem(
                    type=LoadItemType.TENSOR,
                    dest_index=MetadataIndex(key),
                    dest_offsets=torch.Size(into),
                    storage_index=MetadataIndex(key, chunk.offsets),
                    storage_offsets=torch.Size(skipped),
                    lengths=torch.Size(sizes),
                )
            )
        self._reader.read_data(LoadPlan(items), _Into(out)).wait()
        return out


class _Into(DefaultLoadPlanner):
    """Has a reader write into one tensor."""

    def __init__(self, out: torch.Tensor) -> None:
        super().__init__()
        self._out = out

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        """The part of the tensor that an item is for."""
        part = self._out
        for dim, (at, length) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            part = part.narrow(dim, at, length)
        return part

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """Nothing: what was resolved is a view."""
