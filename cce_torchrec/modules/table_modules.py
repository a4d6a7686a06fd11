"""`embedding_bags` and `embeddings` of CCE collections: the modules that hold weights, by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from cce_torchrec.table import Table, physical_table


class TableModules(Mapping[str, nn.Module]):
    """The modules of plain tables under their names, of CCE tables those of chunks ("user#0").

    No tensor [num_embeddings, embedding_dim] of a CCE table exists, so there is no module of its
    own name that could have it for a weight.

    Args:
        tables: those of the collection.
        modules: TorchRec's modules of them and of their chunks.
    """

    def __init__(self, tables: Sequence[Table], modules: nn.ModuleDict) -> None:
        self._tables, self._modules = tables, modules

    def __getitem__(self, name: str) -> nn.Module:
        for table in self._tables:
            if table.cce is not None and table.name == name:
                chunks = [physical_table(name, chunk) for chunk in range(table.cce.num_chunks)]
                raise KeyError(
                    f"table {name!r} is compressed, and has no weight of {table.cce.num_embeddings}"
                    f" rows; the codebooks of its chunks are {chunks}"
                )
        return self._modules[name]

    # Of a mapping, which would take any error of a look-up for "is not in it".
    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self._modules

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)
