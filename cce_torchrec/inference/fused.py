"""The lookup of packed tables as one compiled operator, which reads each id once."""

# No annotations as strings: TorchScript reads those of classes, as types.

import torch

from cce_torchrec.inference.lookup import PackedLookup
from cce_torchrec.inference.packed_tables import PackedTables


class FusedLookup(PackedLookup):
    """See `PackedLookup`; a process that loads it needs the library of native.py."""

    numbers: torch.Tensor
    """int64 [features, ...]: what the operator is told of them."""

    def __init__(self, packed: PackedTables, ignores: bool = False) -> None:
        super().__init__(packed, ignores)
        self.register_buffer("numbers", torch.tensor(_numbers(packed)))

    def forward(
        self, values: torch.Tensor, lengths: torch.Tensor, weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See the class."""
        return torch.ops.cce_inference.lookup(
            values, lengths, weights, self.codes, self.rows, self.numbers, self.hashes,
            self.num_inputs, self.total_dim, self.ignores, self.names,
        )  # fmt: skip


def _numbers(packed: PackedTables) -> list[list[int]]:
    """The fields of `Feature` in _lookup.cpp, in its order, of each feature."""
    # Read by position there: a field that is added here is one in the struct too.
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
            ]
        )
        column += table.dim
    return out
