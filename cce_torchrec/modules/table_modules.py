"""`embedding_bags` and `embeddings` of CCE collections: the modules that hold weights, by name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from cce_torchrec.config import CCEEmbeddingBagConfig
from cce_torchrec.table import Table, physical_table


class ChunkModules(nn.ModuleList):
    """The modules of all chunks of a CCE table, whose parameters are the table's.

    Args:
        config: of the table.
        modules: one for each chunk.
    """

    def __init__(self, config: CCEEmbeddingBagConfig, modules: Iterable[nn.Module]) -> None:
        super().__init__(modules)
        self._config = config

    def __getattr__(self, name: str) -> Any:
        """As of any module, but that `weight` is none [num_embeddings, embedding_dim].

        Raises:
            AttributeError: naming the weights of the chunks.
        """
        # Not by a property, in whose errors torch's own message would take the place of this one.
        if name != "weight":
            return super().__getattr__(name)
        name, chunks = self._config.name, range(self._config.num_chunks)
        raise AttributeError(
            f"table {name!r} is compressed, and has no weight of {self._config.num_embeddings} "
            f"rows; the codebooks of its chunks are {[physical_table(name, j) for j in chunks]}"
        )


class TableModules(nn.ModuleDict):
    """The modules of plain tables under their names, of CCE tables those of chunks ("user#0").

    Under its own name a CCE table has a list of those of its chunks, which is no entry: the names
    of parameters are those of the chunks alone.

    Args:
        tables: those of the collection.
        modules: TorchRec's modules of them and of their chunks.
    """

    def __init__(self, tables: Sequence[Table], modules: nn.ModuleDict) -> None:
        super().__init__(dict(modules.items()))
        self._tables = tables

    def __getitem__(self, key: str) -> nn.Module:
        """The module called `key`, of a CCE table its `ChunkModules`."""
        for table in self._tables:
            if table.cce is not None and table.name == key:
                names = [physical_table(key, chunk) for chunk in range(table.cce.num_chunks)]
                return ChunkModules(table.cce, [self[name] for name in names])
        return super().__getitem__(key)

    def __contains__(self, key: str) -> bool:
        """Whether `key` names a table, or a chunk of one."""
        return super().__contains__(key) or any(key == table.name for table in self._tables)
