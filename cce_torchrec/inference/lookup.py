"""What both lookups of packed tables have: their tensors, and numbers that say what is where."""

from __future__ import annotations

from enum import Enum

import torch
from torch import nn

from cce_torchrec.inference.packed_tables import PackedTables

class Column(Enum):
    """What is said of a feature, in the order of `Feature` in _lookup.cpp."""

    IDS = 0
    FIRST_ID = 1
    RAW_KEY = 2
    IS_RAW = 3
    FIRST_CODE_BYTE = 4
    CODE_BITS = 5
    NUM_ROWS = 6
    HELPER_ROWS = 7
    READS = 8
    IS_HASHED = 9
    CODE_MASK = 10
    FIRST_ROW_BYTE = 11
    ROW_BYTES = 12
    ROW_TYPE = 13
    WIDTH = 14
    NUM_CHUNKS = 15
    IS_MEAN = 16
    INPUT = 17
    COLUMN = 18


class PackedLookup(nn.Module):
    """Pooled embeddings of all features of packed tables, float32 [B, sum of D].

    Args:
        packed: the tables.
        ignores: whether ids out of bounds are read as id 0; they are refused otherwise.
    """

    __constants__ = ("ignores", "num_inputs", "total_dim")

    def __init__(self, packed: PackedTables, ignores: bool = False) -> None:
        super().__init__()
        self.ignores = ignores
        tables = [packed.tables[feature.table] for feature in packed.features]
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
        self.register_buffer("codes", packed.codes.view(torch.int32))
        self.register_buffer("rows", packed.rows)
        self.register_buffer("numbers", torch.tensor(_numbers(packed)))
        self.register_buffer("hashes", hashes)


def _numbers(packed: PackedTables) -> list[list[int]]:
    out, dims = [], 0
    for feature in packed.features:
        table = packed.tables[feature.table]
        own = {
            Column.IDS: len(feature.ids),
            Column.FIRST_ID: feature.ids.start,
            Column.RAW_KEY: feature.raw_key or 0,
            Column.IS_RAW: feature.raw_key is not None,
            Column.FIRST_CODE_BYTE: packed.code_starts[feature.table],
            Column.CODE_BITS: table.code_bits,
            Column.NUM_ROWS: table.num_rows,
            Column.HELPER_ROWS: table.helper_rows,
            Column.READS: table.rows_per_id,
            Column.IS_HASHED: not table.plain and not table.code_bits,
            Column.CODE_MASK: (1 << table.code_bits) - 1,
            Column.FIRST_ROW_BYTE: packed.row_starts[feature.table],
            Column.ROW_BYTES: table.row_type.row_bytes(table.chunk_dim),
            Column.ROW_TYPE: table.row_type.number,
            Column.WIDTH: table.chunk_dim,
            Column.NUM_CHUNKS: table.num_chunks,
            Column.IS_MEAN: feature.mean,
            Column.INPUT: packed.inputs.index(feature.feature),
            Column.COLUMN: dims,
        }
        out.append([int(own[name]) for name in Column])
        dims += table.dim
    return out
