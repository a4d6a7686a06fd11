"""Tensors in files of the layout of safetensors, and an index of them in JSON.

torch.distributed.checkpoint plans which rank writes and reads which part of a tensor. Its own files
hold pickles, which may run code when they are read; these hold bytes and JSON.

rank-0.safetensors   what rank 0 was told to write
tensors.json         dtype and shape of each tensor, and the place of each of its shards
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from cce_torchrec.bars import bar, in_blocks
from cce_torchrec.checkpoint.location import write, write_whole
from cce_torchrec.checkpoint.manifest import Fingerprint
from cce_torchrec.checkpoint.plain import plain
from cce_torchrec.checkpoint.renamed import with_names
from cce_torchrec.checkpoint.tensor_index import DTYPES, INDEX, Place, read_index
from cce_torchrec.spans import span

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Shard(NamedTuple):
    """A part of a tensor that is written, by the name that it has in the file."""

    key: str
    """The tensor that it is of, as in the state dict."""
    name: str
    tensor: torch.Tensor


class SavePlans(DefaultSavePlanner):
    """torch's plans of a flat state dict, of which objects stay what they are."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:
        """The object itself, where torch would pickle it."""
        return object


class LoadPlans(DefaultLoadPlanner):
    """torch's plans of a flat state dict, of which objects are read as JSON."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Puts an object into the state dict, where torch would unpickle it."""
        self.original_state_dict[read_item.dest_index.fqn] = json.loads(value.read())


class TensorWriter(StorageWriter):
    """Takes from torch.distributed.checkpoint what this rank has to write, and writes it later.

    Every byte's place follows from the shapes, so that no rank has to write before all are agreed
    on the index; the writing then needs no collective call and may be done by another thread.

    Args:
        rank: whose file it is.
        copy: take copies in the CPU's memory, which the caller may train over.
    """

    def __init__(self, rank: int, *, copy: bool) -> None:
        self.file = f"rank-{rank}.safetensors"
        self.shards: list[Shard] = []
        self._copy = copy
        self._has_index = False
        self._header = b""
        self._index: dict[str, Any] = {}

    def reset(self, checkpoint_id: Any = None) -> None:
        """Nothing: a writer is for one checkpoint."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Notes whether this rank writes the index."""
        self._has_index = is_coordinator

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """True: where the files go is said when they are written."""
        return True

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """The plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """The plans as they are."""
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Takes the tensors of the plan and says where each will be."""
        results, tensors = [], []
        for item in plan.items:
            value: Any = planner.resolve_data(item)
            if item.type == WriteItemType.BYTE_IO:
                results.append(WriteResult(item.index, 0, plain(item.index.fqn, value)))
            else:
                tensors.append((item, self._taken(item.index.fqn, value.detach())))
        # The largest elements first: each shard then starts at a multiple of its element.
        tensors.sort(key=lambda pair: -pair[1].element_size())
        header: dict[str, Any] = {}
        ends = 0
        for item, tensor in tensors:
            name, begins = _shard_name(item), ends
            ends += tensor.nbytes
            self.shards.append(Shard(item.index.fqn, name, tensor))
            header[name] = {
                "dtype": _NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [begins, ends],
            }
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._header = len(text).to_bytes(8, "little") + text
        for (item, tensor), shard in zip(tensors, self.shards, strict=True):
            at = len(self._header) + header[shard.name]["data_offsets"][0]
            results.append(WriteResult(item.index, tensor.nbytes, (self.file, at)))
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def _taken(self, key: str, tensor: torch.Tensor) -> torch.Tensor:
        dense = tensor.layout == torch.strided and not tensor.is_meta
        if not dense or tensor.dtype not in _NAMES:
            raise ValueError(
                f"{key}: a {tensor.layout} tensor of {tensor.dtype} on {tensor.device.type} is "
                "nothing that a checkpoint holds (dense ones of the types of safetensors); convert "
                "it, or register the buffer with persistent=False"
            )
        tensor = tensor.resolve_conj().resolve_neg()  # of which the bytes are others
        return tensor.to("cpu", copy=True).contiguous() if self._copy else tensor

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Makes the index; on the first rank alone."""
        found = {result.index: result.storage_data for part in results for result in part}
        for key, value in metadata.state_dict_metadata.items():
            if isinstance(value, BytesStorageMetadata):
                self._index[key] = {"object": found[MetadataIndex(key)]}
                continue
            shards = []
            for chunk in value.chunks:
                file, at = found[MetadataIndex(key, chunk.offsets)]
                place = {"offsets": list(chunk.offsets), "shape": list(chunk.sizes)}
                shards.append(place | {"file": file, "at": at})
            self._index[key] = {
                "dtype": _NAMES[value.properties.dtype],
                "shape": list(value.size),
                "shards": shards,
            }

    def write(self, checkpoint: Path) -> dict[str, Fingerprint]:
        """Writes this rank's file, and the first rank's index; what they are, by name."""
        files = {self.file: write(checkpoint / self.file, self._parts())}
        if self._has_index:
            files[INDEX] = write_whole(checkpoint / INDEX, json.dumps(self._index))
        return files

    def _parts(self) -> Iterator[memoryview]:
        def whole() -> Iterator[memoryview]:
            yield memoryview(self._header)
            for shard in self.shards:
                # One at a time: of a GPU's tables the host may have no room for all.
                yield _bytes(shard.tensor.cpu().contiguous())

        if self._copy:  # a thread writes, beside training and its bar
            return whole()
        total = len(self._header) + sum(shard.tensor.nbytes for shard in self.shards)
        return in_blocks(whole(), total, f"writing {self.file}")


class TensorReader(StorageReader):
    """Reads what `TensorWriter` has written.

    Args:
        checkpoint: its folder.
        files: those that the manifest names; others are not opened.
        weights: what the model calls weights that have another name in the checkpoint.
    """

    def __init__(
        self, checkpoint: Path, files: dict[str, Fingerprint], weights: dict[str, str]
    ) -> None:
        self._checkpoint, self._files, self._weights = checkpoint, files, weights
        self._metadata = Metadata({})

    def reset(self, checkpoint_id: Any = None) -> None:
        """Nothing: a reader is for one checkpoint."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """True: the reader was told where the files are."""
        return True

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index, as torch.distributed.checkpoint has it.

        Raises:
            ValueError: naming the tensor of which the index says what cannot be.
        """
        return with_names(read_index(self._checkpoint, self._files), self._weights)

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Keeps the index, of which the first rank has told the others."""
        self._metadata = metadata

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """The plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """The plans as they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Reads each part of the plan into the tensor that it is for."""
        by_file: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            found = self._metadata.storage_data[item.storage_index]
            if item.type == LoadItemType.BYTE_IO:
                planner.load_bytes(item, io.BytesIO(json.dumps(found).encode()))
            else:
                by_file.setdefault(found.file, []).append(item)
        shown = bar(sum(map(len, by_file.values())), "reading the checkpoint", "tensor")
        with span("checkpoint load, read"), shown:
            for name, items in by_file.items():
                with (self._checkpoint / name).open("rb") as file:
                    for item in items:
                        self._read(file, item, planner)
                        shown.update()
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _read(self, file: Any, item: ReadItem, planner: LoadPlanner) -> None:
        found: Place = self._metadata.storage_data[item.storage_index]
        at, shape, dtype = found.at, list(found.shape), found.dtype
        if shape:  # rows that nobody asked for are not read
            at += item.storage_offsets[0] * math.prod(shape[1:]) * dtype.itemsize
            shape[0] = item.lengths[0]
        part = torch.empty(shape, dtype=dtype, device="cpu")  # whatever the job's default is
        file.seek(at)
        view = _bytes(part)
        if file.readinto(view) != len(view):
            raise ValueError(f"{self._checkpoint / found.file} ends before byte {at + len(view)}")
        for dim in range(1, len(shape)):
            part = part.narrow(dim, item.storage_offsets[dim], item.lengths[dim])
        target = planner.resolve_tensor(item).detach()
        target.copy_(part)
        planner.commit_tensor(item, target)


def _shard_name(item: WriteItem) -> str:
    data = item.tensor_data
    whole = data is None or data.chunk.sizes == data.size
    at = "" if data is None or whole else f"[{','.join(map(str, data.chunk.offsets))}]"
    return f"{item.index.fqn}{at}"


def _bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    # numpy has no bfloat16, and a tensor without dimensions has no other view.
    return tensor.reshape(-1).view(torch.uint8).numpy().data
