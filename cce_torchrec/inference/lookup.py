"""What both lookups of packed tables have in common."""

# No annotations as strings: TorchScript reads those of classes, as types.

from typing import Final

import torch
from torch import nn

from cce_torchrec.inference.packed_tables import PackedTables


def reordered(lengths: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Where in a batch the ids [V] of the features `order` are, of `lengths` [features, B]."""
    counts = lengths.sum(1)
    starts = (counts.cumsum(0) - counts).index_select(0, order)
    own = counts.index_select(0, order)
    moved = (starts - (own.cumsum(0) - own)).repeat_interleave(own)
    return moved + torch.arange(moved.size(0), device=moved.device)


class PackedLookup(nn.Module):
    """Pooled embeddings of all features of packed tables, float32 [B, sum of D].

    Called with `values`, ids [V] of type int32 or int64, those of one feature after those of
    another; `lengths` of bags [features * B]; and, or None, `weights` of ids, float32 [V].

    Args:
        packed: the tables.
        ignores: whether ids out of bounds are read as id 0; they are refused otherwise.
    """

    ignores: Final[bool]
    num_inputs: Final[int]
    """Features of a batch."""
    total_dim: Final[int]
    codes: torch.Tensor
    """int32 [words]."""
    rows: torch.Tensor
    """uint8 [bytes]."""
    hashes: torch.Tensor
    """int64 [features, 4, most chunks]: see `PackedTable.hashes`."""

    def __init__(self, packed: PackedTables, ignores: bool = False) -> None:
        super().__init__()
        self.ignores = ignores
        tables = packed.tables_of_features
        self.num_inputs = len(packed.inputs)
        self.total_dim = sum(table.dim for table in tables)
        # Of features, for messages.
        self.names = [
            f"table {table.name!r}, feature {feature.feature!r}"
            for feature, table in zip(packed.features, tables, strict=True)
        ]
        hashes = torch.zeros(len(tables), 4, max(t.num_chunks for t in tables), dtype=torch.int64)
        for own, table in zip(hashes, tables, strict=True):
            if table.hashes:
                own[:, : table.num_chunks] = torch.tensor(table.hashes).t()
        self.register_buffer("hashes", hashes)
        self.register_buffer("codes", packed.codes.view(torch.int32))
        self.register_buffer("rows", packed.rows)
