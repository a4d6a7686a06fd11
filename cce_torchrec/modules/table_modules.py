"""`embedding_bags` and `embeddings` of CCE collections: the modules that hold weights, by name."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from cce_torchrec.table import Table, physical_table


class TableModules(nn.ModuleDict):
    """The modules of plain tables under their names, of CCE tables those of chunks ("user#0").

    No tensor [num_embeddings, embedding_dim] of a CCE table exists, so there is no module of its
    own name that could have it for a weight.

    Args:
        tables: those of the collection.
        modules: TorchRec's modules of them and of their chunks.
    """

    def __init__(self, tables: Sequence[Table], modules: nn.ModuleDict) -> None:
        super().__init__(dict(modules.items()))
        self._tables = tables

    def __getitem__(self, key: str) -> nn.Module:
        """The module called `key`.

        Raises:
            KeyError: of a CCE table it names the modules of the chunks.
        """
        for table in self._tables:
            if table.cce is not None and table.name == key:
                chunks = [physical_table(key, chunk) for chunk in range(table.cce.num_chunks)]
                raise KeyError(
                    f"table {key!r} is compressed, and has no weight of {table.cce.num_embeddings} "
                    f"rows; the codebooks of its chunks are {chunks}"
                )
        return super().__getitem__(key)
