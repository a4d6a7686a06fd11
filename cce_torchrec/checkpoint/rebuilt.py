"""The collections of a checkpoint without the model that was trained: made anew from its tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torchrec.modules.embedding_configs import (
    DataType,
    EmbeddingBagConfig,
    EmbeddingConfig,
    PoolingType,
    dtype_to_data_type,
)

from cce_torchrec.checkpoint.folder import find, read_manifest
from cce_torchrec.checkpoint.format_2 import Format2Reader
from cce_torchrec.checkpoint.load import load_checkpoint
from cce_torchrec.checkpoint.location import location
from cce_torchrec.checkpoint.manifest import CCETableRecord, Manifest, Reading, TableRecord
from cce_torchrec.checkpoint.read_as import ReadAs
from cce_torchrec.checkpoint.tables import table_of
from cce_torchrec.checkpoint.tensor_files import TensorReader
from cce_torchrec.config import CCEEmbeddingBagConfig
from cce_torchrec.modules.embedding_bag_collection import CCEEmbeddingBagCollection
from cce_torchrec.modules.embedding_collection import CCEEmbeddingCollection

Collection = CCEEmbeddingBagCollection | CCEEmbeddingCollection


@dataclass(frozen=True, kw_only=True)
class SavedCollection:
    """The tables of one collection of a checkpoint."""

    path: str
    """In the model, "" of the model itself."""
    tables: list[Any]
    """Configurations, in their order; plain ones of sequences are TorchRec's `EmbeddingConfig`."""
    sequences: bool
    weighted: bool

    def build(self, device: torch.device) -> Collection:
        """The collection, with fresh values."""
        if self.sequences:
            return CCEEmbeddingCollection(self.tables, device)
        return CCEEmbeddingBagCollection(self.tables, device, self.weighted)


def saved_collections(
    folder: str | Path,
    read_as: ReadAs | None = None,
) -> list[SavedCollection]:
    """The collections whose tables a checkpoint has; reads two small files.

    Args:
        folder: see `checkpoint_info`.
        read_as: in place of what the checkpoint says of features, pooling and weights. One of
            before these were saved says nothing: a table is then read by the feature of its own
            name, and bags are summed.

    Raises:
        ValueError: there is no checkpoint, it is damaged, or a table is named that it has not.
    """
    path = find(location(folder))
    manifest = read_manifest(path)
    told = (read_as or ReadAs()).resolved(manifest.tables)
    names = _weight_keys(path, manifest)
    out: dict[str, list[TableRecord]] = {}
    for record in manifest.tables.values():
        out.setdefault(record.collection, []).append(record)
    return [_collection(path_, records, names, told) for path_, records in out.items()]


def load_collections(folder: str | Path, saved: Sequence[SavedCollection]) -> dict[str, Collection]:
    """Unsharded collections on the CPU, by their paths, with what the checkpoint has of them."""
    made = {one.path: one.build(torch.device("cpu")) for one in saved}
    root = made[""] if "" in made else nn.Module()
    for path, collection in made.items():
        put(root, path, collection)
    tables = [f"{one.path}.{t.name}" if one.path else t.name for one in saved for t in one.tables]
    # Of these tables alone: of the rest of the model nothing is known here.
    load_checkpoint(folder, root, tables=tables)
    return made


def bag_tables(folder: str | Path) -> list[EmbeddingBagConfig]:
    """All tables of a checkpoint as those of one collection, to plan with; reads two small files.

    Raises:
        ValueError: see `saved_collections`; or two collections have tables of one name.
    """
    tables = [table for one in saved_collections(folder) for table in one.tables]
    names = [table.name for table in tables]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{folder}: two collections have tables {twice}; plan the model itself")
    # Plans of sequences are those of bags: bytes and rows are the same.
    return [table if isinstance(table, EmbeddingBagConfig) else _as_bags(table) for table in tables]


def _as_bags(table: EmbeddingConfig) -> EmbeddingBagConfig:
    """A plain table of sequences as one of bags, which has the same bytes."""
    names = ("name", "num_embeddings", "embedding_dim", "feature_names", "data_type")
    return EmbeddingBagConfig(**{name: getattr(table, name) for name in names})


def put(root: nn.Module, path: str, module: nn.Module) -> None:
    """Registers `module` in `root` under a dotted path, with plain modules in between."""
    if not path:
        return
    *parents, name = path.split(".")
    for parent in parents:
        if parent not in dict(root.named_children()):
            root.add_module(parent, nn.Module())
        root = root.get_submodule(parent)
    root.add_module(name, module)


def _weight_keys(path: Path, manifest: Manifest) -> dict[str, tuple[str, torch.dtype]]:
    """Of each table, by its full name, the key of a weight behind its collection, and its type."""
    kind: Any = Format2Reader if manifest.is_format_2 else TensorReader
    found = kind(path, manifest.files, {}).read_metadata().state_dict_metadata
    out: dict[str, tuple[str, torch.dtype]] = {}
    for key, entry in found.items():
        name = key.removeprefix("model.")
        # Optimizer state has keys of its own, in front of the same names.
        if not (key.startswith("model.") and isinstance(entry, TensorStorageMetadata)):
            continue
        table = table_of(name, manifest.tables) if name.endswith(".weight") else None
        if table is not None:
            inside = name.removeprefix(f"{manifest.tables[table].collection}.")
            out[table] = inside, entry.properties.dtype
    if missing := sorted(manifest.tables.keys() - out.keys()):
        raise ValueError(f"{path}: tables {missing} have no weights in it; load another checkpoint")
    return out


def _collection(
    path: str,
    records: list[TableRecord],
    names: dict[str, tuple[str, torch.dtype]],
    told: ReadAs,
) -> SavedCollection:
    # By the names of TorchRec's collection of sequences, and of this package's.
    keys = [names[record.full_name][0] for record in records]
    sequences = any(f".{key}".startswith((".bags.", ".embeddings.")) for key in keys)
    read = {one.name: told.reading(one.full_name, _reading(one)) for one in records}
    tables = [
        _config(record, read[record.name], names[record.full_name][1], sequences)
        for record in records
    ]
    weighted = any(one.weighted for one in read.values()) and not sequences
    return SavedCollection(path=path, tables=tables, sequences=sequences, weighted=weighted)


def _reading(record: TableRecord) -> Reading:
    """What the checkpoint says, or what most models do."""
    ranges = record.id_ranges if isinstance(record, CCETableRecord) else None
    default = Reading(features=list(ranges or [record.name]), pooling="SUM", weighted=False)
    return record.reading or default


def _config(record: TableRecord, reading: Reading, dtype: torch.dtype, sequences: bool) -> Any:
    kind: DataType = dtype_to_data_type(dtype)
    fields: dict[str, Any] = {
        "name": record.name,
        "num_embeddings": record.num_embeddings,
        "embedding_dim": record.embedding_dim,
        "feature_names": reading.features,
        "data_type": kind,
    }
    if not sequences:
        fields["pooling"] = PoolingType[reading.pooling]
    if not isinstance(record, CCETableRecord):
        return EmbeddingConfig(**fields) if sequences else EmbeddingBagConfig(**fields)
    return CCEEmbeddingBagConfig(**fields, **compressed_fields(record))


def compressed_fields(record: CCETableRecord) -> dict[str, Any]:
    """The fields of `CCEEmbeddingBagConfig` beyond TorchRec's, as a checkpoint has them."""
    names = ("num_chunks", "num_rows", "num_helper_rows", "seed", "learned_codes", "track_seen",
             "track_counts", "hash_ids", "rotate_chunks")  # fmt: skip
    ranges = record.id_ranges
    return {name: getattr(record, name) for name in names} | {
        "id_ranges": None if ranges is None else {f: range(*ids) for f, ids in ranges.items()}
    }
