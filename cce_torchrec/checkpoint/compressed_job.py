"""A plain job's checkpoint with its large tables compressed, all else as it was saved."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchrec.modules.embedding_configs import (
    EmbeddingBagConfig,
    EmbeddingConfig,
    PoolingType,
    dtype_to_data_type,
)
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from tqdm import tqdm

from cce_torchrec.byte_sizes import said_bytes
from cce_torchrec.checkpoint.compressed_table import (
    Budget,
    CompressedSaved,
    best,
    compressed_to,
    forms,
    stays,
)
from cce_torchrec.checkpoint.location import location, store_of
from cce_torchrec.checkpoint.manifest import Reading
from cce_torchrec.checkpoint.plain_source import PlainSource, PlainTable
from cce_torchrec.checkpoint.read_as import ReadAs
from cce_torchrec.checkpoint.rebuilt import Collection, SavedCollection, put
from cce_torchrec.checkpoint.save import save_checkpoint
from cce_torchrec.checkpoint.whole_file import whole_file
from cce_torchrec.clustering.imported import import_table
from cce_torchrec.modules.compressible import weights_of
from cce_torchrec.modules.embedding_bag_collection import CCEEmbeddingBagCollection
from cce_torchrec.modules.embedding_collection import CCEEmbeddingCollection
from cce_torchrec.table import named


class CompressedJob:
    """Compresses the tables of a plain job, and saves it.

    Args:
        source: the job.
        tables: names of the tables to compress; None: those of `min_bytes` or more.
        min_bytes: of a table that is compressed if none is named.
        budget: for these.
        read_as: features and pooling, for those who read the checkpoint without the model.

    Raises:
        ValueError: an unknown table, none to compress, or a budget too small.
    """

    def __init__(
        self,
        source: PlainSource,
        *,
        budget: Budget,
        tables: Sequence[str] | None = None,
        min_bytes: int = 1 << 20,
        read_as: ReadAs | None = None,
    ) -> None:
        self._source, self._budget = source, budget
        by_name = {table.full_name: table for table in source.tables}
        self._read_as = (read_as or ReadAs()).resolved(by_name)
        chosen = (
            {name for name, table in by_name.items() if table.bytes >= min_bytes}
            if tables is None
            else named(tables, by_name, "tables")
        )
        if not chosen:
            raise ValueError(
                f"none of the tables {sorted(by_name)} has {said_bytes(min_bytes)} or more; name "
                "those to compress, or lower the limit"
            )
        self._chosen = [table for name, table in by_name.items() if name in chosen]
        self.model = nn.Module()
        """Has the state dict of the job, with compressed tables in it, after `run`."""

    def run(self, scratch: Path) -> list[CompressedSaved]:
        """Compresses table by table; what became of each.

        Args:
            scratch: a folder on a disk with room for the largest table, which is written there if
                it comes in parts.
        """
        # All are looked at before the first is read, as each may take minutes.
        made = [
            (table, forms(table, self._fields(table), self._budget, self._chosen))
            for table in self._chosen
        ]
        held = self._budget.holds(self._chosen)
        why = "which the budget holds" if held else "as compressed it would not be smaller"
        said: dict[str, CompressedSaved] = {}
        filled: dict[str, CCEEmbeddingBagCollection] = {}
        bar = tqdm(made, unit="table", disable=not sys.stderr.isatty())
        for table, candidates in bar:
            bar.set_description(table.full_name)
            # Found before a table is read, and told with those that are compressed.
            if not candidates:
                said[table.full_name] = stays(table, why)
                continue
            with tempfile.TemporaryDirectory(dir=scratch, prefix=".table-") as folder:
                weight = self._source.weight(table, Path(folder) / "weight.npy")
                config = best(weight, candidates)
                collection = CCEEmbeddingBagCollection([config])
                report = import_table(collection, config.name, weight)
                del weight  # which maps a file that is removed now
            filled[table.full_name] = collection
            said[table.full_name] = compressed_to(table, config, report)
        self._assemble(filled)
        return [
            said.get(table.full_name) or stays(table, "not chosen") for table in self._source.tables
        ]

    def save(self, out: str | Path, *, step: int = 0) -> Path:
        """Writes the job, and returns the checkpoint's folder or the file.

        Args:
            out: a folder or URI of an object store, which becomes one of checkpoints, or a file
                `.pt`, which becomes one of torch.save with the state dict.
            step: optimizer steps that the job has had.

        Raises:
            ValueError: it is there already, or cannot be written.
        """
        path = refuse_existing(out)
        # Both appear when they are whole, and a checkpoint has checksums, too.
        if path.suffix != ".pt":
            return save_checkpoint(path, self.model, step=step)
        with whole_file(path) as writing:
            torch.save(self.model.state_dict(), writing)
        return path

    def _assemble(self, made: Mapping[str, CCEEmbeddingBagCollection]) -> None:
        """Puts compressed tables, plain ones and the rest of the job into `model`."""
        paths = dict.fromkeys(table.collection for table in self._source.tables)
        built: dict[str, nn.Module] = {}
        for path in paths:
            own = [table for table in self._source.tables if table.collection == path]
            configs = [
                made[t.full_name].embedding_bag_configs()[0]
                if t.full_name in made
                else self._plain(t)
                for t in own
            ]
            compressed = any(table.full_name in made for table in own)
            built[path] = self._collection(own, configs) if compressed else _torchrec(own, configs)
        # A state dict may well be that of a collection alone.
        self.model = built[""] if "" in built else nn.Module()
        for path, collection in built.items():
            put(self.model, path, collection)
        for table in self._source.tables:
            collection = built[table.collection]
            if table.full_name in made:
                _take(collection, made[table.full_name], table.name)
            else:
                with torch.no_grad():
                    own_weight = weights_of(collection)[table.name].get_parameter("weight")
                    own_weight.copy_(self._source.tensor(table.key))
        for name, value in self._source.rest().items():
            _put_tensor(self.model, name, value)

    def _collection(self, tables: Sequence[PlainTable], configs: list[Any]) -> Collection:
        return SavedCollection(
            path=tables[0].collection,
            tables=configs,
            sequences=tables[0].sequences,
            weighted=bool(self._read_as.weighted),
        ).build(torch.device("cpu"))

    def _fields(self, table: PlainTable) -> dict[str, Any]:
        default = Reading(features=[table.name], pooling="SUM", weighted=False)
        reading = self._read_as.reading(table.full_name, default)
        return {
            "name": table.name,
            "num_embeddings": table.shape[0],
            "embedding_dim": table.shape[1],
            "feature_names": reading.features,
            "data_type": dtype_to_data_type(table.dtype),
            "pooling": PoolingType[reading.pooling],
        }

    def _plain(self, table: PlainTable) -> EmbeddingBagConfig | EmbeddingConfig:
        fields = self._fields(table)
        if not table.sequences:
            return EmbeddingBagConfig(**fields)
        del fields["pooling"]
        return EmbeddingConfig(**fields)


def refuse_existing(out: str | Path) -> Path:
    """The place of a new job's checkpoint.

    Raises:
        ValueError: something is there already.
    """
    path = location(out)
    # A folder with checkpoints would get this one as its latest.
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise ValueError(f"{path} is there already; give another name, or remove it")
    if path.suffix == ".pt" and store_of(path) is not None:
        raise ValueError(f"{path}: a state dict is written to a local file; give a folder's URI")
    return path


def _torchrec(tables: Sequence[PlainTable], configs: list[Any]) -> nn.Module:
    """A collection of which nothing is compressed, which `compress_like` leaves alone."""
    kind: Any = EmbeddingCollection if tables[0].sequences else EmbeddingBagCollection
    collection: nn.Module = kind(tables=configs)
    return collection


def _take(collection: nn.Module, made: CCEEmbeddingBagCollection, name: str) -> None:
    """Copies a table that was compressed by itself into its collection."""
    bags: Any = collection.bags if isinstance(collection, CCEEmbeddingCollection) else collection
    with torch.no_grad():
        for key, module in made.embedding_bags.items():
            bags.embedding_bags[key].get_parameter("weight").copy_(module.get_parameter("weight"))
    bags.codes[name].load_state_dict(made.codes[name].state_dict())


def _put_tensor(root: nn.Module, name: str, value: torch.Tensor) -> None:
    """Registers a tensor under its name in a state dict."""
    path, _, own = name.rpartition(".")
    module = root
    for part in path.split(".") if path else []:
        if part not in dict(module.named_children()):
            module.add_module(part, nn.Module())
        module = module.get_submodule(part)
    # Of a buffer and of a parameter the key is the same, and a load asks for no more.
    module.register_buffer(own, value)
