"""What all lookups of packed tables have in common."""

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


def refuse_cuda(values: torch.Tensor, rows: torch.Tensor) -> None:
    """Raises ValueError if ids or tables are on a GPU, for lookups that run on CPUs."""
    if values.is_cuda or rows.is_cuda:
        raise ValueError(
            "this lookup of packed tables runs on CPUs, and the tables or the batch are on a GPU; "
            "make the collection with lookup='triton' for GPUs"
        )


def check_weights(is_weighted: bool, weights: torch.Tensor | None) -> None:
    """Raises ValueError if tables that are pooled by weights get none, or others some."""
    # Either would be pooled in another way than in training, and nobody would see it.
    if is_weighted and weights is None:
        raise ValueError("the tables are pooled by weights; give one for each id")
    if not is_weighted and weights is not None:
        raise ValueError("the tables are not pooled by weights; leave the weights out")


class PackedLookup(nn.Module):
    """Pooled embeddings of all features of packed tables, float32 [B, sum of D].

    Called with `values`, ids [V] of type int32 or int64, those of one feature after those of
    another; `lengths` of bags [features * B]; and, of weighted tables, `weights` of ids [V].

    Args:
        packed: the tables.
        ignores: whether ids out of bounds are read as id 0; they are refused otherwise.
    """

    ignores: Final[bool]
    is_weighted: Final[bool]
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
        self.ignores, self.is_weighted = ignores, packed.is_weighted
        tables = packed.tables_of_features
        self.inputs = packed.inputs
        self.num_inputs = len(self.inputs)
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


def numbers_of(packed: PackedTables) -> list[list[int]]:
    """The fields of `Feature` in _lookup.cpp, in its order, of each feature.

    int64 of each; triton_lookup.py says what they are.
    """
    # Read by position: a field that is added here is one in the struct and in the kernel too.
    out, column = [], 0
    code_starts, row_starts = packed.code_starts, packed.row_starts
    for feature, table in zip(packed.features, packed.tables_of_features, strict=True):
        of_ids = [len(feature.ids), feature.ids.start, feature.raw_key or 0]
        of_codes = [code_starts[feature.table], table.code_bits, table.num_rows, table.helper_rows]
        of_rows = [row_starts[feature.table], table.row_type.row_bytes(table.chunk_dim)]
        out.append(
            [
                *of_ids,
                int(feature.raw_key is not None),
                *of_codes,
                table.rows_per_id,
                int(table.is_hashed),
                (1 << table.code_bits) - 1,
                *of_rows,
                table.row_type.number,
                table.chunk_dim,
                table.num_chunks,
                int(feature.mean),
                packed.inputs.index(feature.feature),
                column,
                feature.first_chunk,
            ]
        )
        column += table.dim
    return out
