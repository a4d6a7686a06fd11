"""What a plain TorchRec job has saved: its tables and everything else, read one by one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from cce_torchrec.checkpoint import folder as folders
from cce_torchrec.checkpoint.full_table import folder_reader, full_table, read_file
from cce_torchrec.checkpoint.location import location, store_of
from cce_torchrec.checkpoint.manifest import CCETableRecord

_NESTED = 3
"""Levels of dictionaries in which a file may have the state dict."""
_WEIGHT = re.compile(
    r"(?:(?P<path>.+)\.)?(?P<kind>embedding_bags|embeddings)\.(?P<name>[^.]+)\.weight"
)


@dataclass(frozen=True, kw_only=True)
class PlainTable:
    """One table of a plain job."""

    key: str
    """Of its weight in what was saved."""
    collection: str
    """Path of its collection in the model."""
    name: str
    sequences: bool
    """Whether it is of an EmbeddingCollection."""
    shape: tuple[int, int]
    dtype: torch.dtype

    @property
    def full_name(self) -> str:
        """`collection.table`."""
        return f"{self.collection}.{self.name}" if self.collection else self.name

    @property
    def bytes(self) -> int:
        """Of its weight."""
        return self.shape[0] * self.shape[1] * self.dtype.itemsize


class PlainSource:
    """A file of torch.save or safetensors with a state dict, or a folder of a checkpoint.

    Args:
        path: of the file, of a checkpoint of torch.distributed.checkpoint, or of this package.
        prefix: what the keys of the model's state dict begin with in a dictionary of several, such
            as "model."; None finds the one that has tables.

    Raises:
        ValueError: it cannot be read, has no table, or has compressed ones already.
    """

    def __init__(self, path: str | Path, prefix: str | None = None) -> None:
        self.path = location(path)
        if not self.path.exists():
            raise ValueError(f"{self.path} is not there")
        self._shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        self._prefixes: dict[str, str] = {}
        self._read: Callable[[str], torch.Tensor]
        self.left_out: list[str] = []
        """Keys of the model that are no tensors."""
        self._own = self._own_collections()
        is_folder = self.path.is_dir() or store_of(self.path) is not None
        self._state: Mapping[str, Any] = {} if is_folder else self._open_file()
        if is_folder:
            self._open_folder()
        self.prefix = self._prefix() if prefix is None else prefix
        self.left_out = [key for key in self.left_out if key.startswith(self.prefix)]
        self.tables = self._tables()
        names = [table.full_name for table in self.tables]
        if not names:
            some = sorted(self._shapes)[:10]
            raise ValueError(
                f"{self.path}: no key is PATH.embedding_bags.TABLE.weight or PATH.embeddings.TABLE."
                f"weight behind the prefix {self.prefix!r}; keys are {some}. Give --prefix, or the "
                "state dict of a TorchRec model"
            )
        compressed = sorted({name.split("#")[0] for name in names if "#" in name})
        if compressed:
            raise ValueError(f"{self.path}: tables {compressed} are CCE tables already")

    def _open_file(self) -> dict[str, Any]:
        found = read_file(self.path)
        if not isinstance(found, Mapping):
            raise ValueError(f"{self.path} is a lone weight and no state dict; use import_table")
        state = {}
        for prefix, name, value in _values(found):
            key = prefix + name
            state[key], self._prefixes[key] = value, prefix
            # Not of a subclass: shards are parts, which only their own libraries know.
            if type(value) in (torch.Tensor, torch.nn.Parameter):
                self._shapes[key] = tuple(value.shape), value.dtype
            else:
                self.left_out.append(key)
        return state

    def _open_folder(self) -> None:
        reader, metadata, verify = folder_reader(self.path)
        # Where torch.distributed.checkpoint flattened nested dictionaries, it kept the way to each.
        ways = metadata.planner_data if isinstance(metadata.planner_data, dict) else {}
        for key, entry in metadata.state_dict_metadata.items():
            way = ways.get(key, (key,))
            self._prefixes[key] = "".join(f"{part}." for part in way[:-1])
            if self._own is not None and key.startswith("model."):
                self._prefixes[key] = "model."
            if isinstance(entry, TensorStorageMetadata):
                self._shapes[key] = tuple(entry.size), entry.properties.dtype
            else:
                self.left_out.append(key)

        def read(key: str) -> torch.Tensor:
            size, dtype = self._shapes[key]
            verify(key)
            value = torch.empty(size, dtype=dtype)
            dcp.load({key: value}, storage_reader=reader, no_dist=True)
            return value

        self._read = read

    def _prefix(self) -> str:
        """That of the one dictionary with tables.

        Raises:
            ValueError: several have some.
        """
        found = {
            prefix
            for key, prefix in self._prefixes.items()
            if key in self._shapes and _WEIGHT.fullmatch(key.removeprefix(prefix))
        }
        # Of a model and a moving average of it, say, one is meant.
        if len(found) > 1:
            raise ValueError(
                f"{self.path} has tables under the prefixes {sorted(found)}; choose one by --prefix"
            )
        return found.pop() if found else ""

    def _tables(self) -> list[PlainTable]:
        own = self._own or set()
        out = []
        for key, (shape, dtype) in self._shapes.items():
            match = _WEIGHT.fullmatch(key.removeprefix(self.prefix))
            if not key.startswith(self.prefix) or match is None or len(shape) != 2:
                continue
            path, sequences = match["path"] or "", match["kind"] == "embeddings"
            for inside in (".bags.embedding_bag_collection", ".embedding_bag_collection"):
                # Collections of this package have one of TorchRec's inside.
                if f".{path}".endswith(inside) and f".{path}".removesuffix(inside)[1:] in own:
                    path, sequences = f".{path}".removesuffix(inside)[1:], ".bags." in inside
            out.append(
                PlainTable(
                    key=key, collection=path, name=match["name"], sequences=sequences,
                    shape=(shape[0], shape[1]), dtype=dtype,
                )
            )  # fmt: skip
        return out

    def _own_collections(self) -> set[str] | None:
        """Paths of collections that the manifest has; None if it is no checkpoint of this package.

        Raises:
            ValueError: some tables are compressed.
        """
        try:
            records = folders.read_manifest(folders.find(self.path)).tables.values()
        except ValueError:
            return None
        # To compress them again would lose twice, and their codes are no plain state.
        if compressed := [r.full_name for r in records if isinstance(r, CCETableRecord)]:
            raise ValueError(f"{self.path}: tables {compressed} are CCE tables already")
        return {record.collection for record in records}

    def weight(self, table: PlainTable, scratch: Path) -> torch.Tensor | np.ndarray[Any, Any]:
        """The weight of a table, which is read into the file `scratch` where it comes in parts."""
        # What torch.save wrote is mapped, and needs no copy.
        if self._state:
            return self._state[table.key].detach()
        # numpy has no bfloat16: then it is in memory as a whole.
        file = None if table.dtype == torch.bfloat16 else scratch
        return full_table(self.path, table.key, file=file)

    def rest(self) -> dict[str, torch.Tensor]:
        """All tensors of the model that are no tables, by their names in its state dict."""
        tables = {table.key for table in self.tables}
        keys = [k for k in self._shapes if k.startswith(self.prefix) and k not in tables]
        return {key.removeprefix(self.prefix): self.tensor(key) for key in keys}

    def tensor(self, key: str) -> torch.Tensor:
        """The value of a key, as it was saved."""
        return self._state[key].detach() if self._state else self._read(key)


def _values(found: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str, Any]]:
    """Prefix, name and value of all that nested dictionaries hold."""
    for key, value in found.items():
        if isinstance(value, Mapping) and prefix.count(".") < _NESTED:
            yield from _values(value, f"{prefix}{key}.")
        else:
            yield prefix, str(key), value
