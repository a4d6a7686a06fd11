"""The lookup of packed tables in operators of ONNX.

1. Lengths say of every id in which bag it is (`onnx_bags.py`).
2. Ids are checked, and become their table's; these become rows, by codes or hashes.
3. Vectors are added up bag by bag.

ONNX Runtime 1.32 on a CPU was found to wrap uint64 around in products and sums, to shift and to
divide it as unsigned, and to cast it from and to int64 bit by bit, so hashes are computed there.
Codes are unpacked, as words of packed ones do not convert, and bytes of 56 bits came out wrong.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch

from cce_torchrec.inference.onnx_bags import Batch
from cce_torchrec.inference.onnx_nodes import Graph, column
from cce_torchrec.inference.packed_tables import PackedFeature, PackedTable, PackedTables
from cce_torchrec.packing import CodePacking

OPSET = 18
"""The first that has bitwise operators."""
_IR_VERSION = 8
"""That of this opset, which every runtime reads that has the operators."""
_BLOCK = 1 << 18
"""Ids whose codes are unpacked at a time; a multiple of 8, so that each block begins a byte."""
_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
"""See `codes.hashing.mix`."""
_MASK = 2**64 - 1


Arrays = dict[str, np.ndarray[Any, Any]]


def lookup_graph(packed: PackedTables, ignores: bool) -> tuple[Any, Arrays]:
    """The ModelProto of a lookup of `packed`, and the content of its large tensors, by name.

    Its inputs are `values` int64 [V], `lengths` int64 [features * B] and, of weighted tables,
    `weights` float32 [V]; its output `pooled` is float32 [B, sum of D]. An id out of bounds is
    read as id 0 if `ignores`, and otherwise makes a node fail that is named after table, feature
    and range.

    Raises:
        ValueError: `onnx` is not installed.
    """
    graph = Graph()
    types, helper = graph.types, graph.onnx.helper
    batch = Batch(graph, packed)
    tables = _Tables(graph, packed, ignores)
    pooled = []
    for feature, table in zip(packed.features, packed.tables_of_features, strict=True):
        number = packed.inputs.index(feature.feature)
        vectors = tables.vectors(batch.ids[number], feature, table)
        pooled.append(batch.pooled(vectors, number, table.dim, feature.mean))
    dims = [table.dim for table in packed.tables_of_features]
    graph.nodes.append(helper.make_node("Concat", pooled, ["pooled"], axis=1, name="pooled"))
    inputs = [
        graph.value_info("values", types.INT64, ["ids"]),
        graph.value_info("lengths", types.INT64, ["bags"]),
    ]
    if packed.is_weighted:
        inputs.append(graph.value_info("weights", types.FLOAT, ["ids"]))
    outputs = [graph.value_info("pooled", types.FLOAT, ["batch", sum(dims)])]
    tensors = list(graph.tensors.values())
    made = helper.make_model(
        helper.make_graph(graph.nodes, "lookup", inputs, outputs, tensors),
        opset_imports=[helper.make_opsetid("", OPSET)],
        producer_name="cce_torchrec",
        ir_version=_IR_VERSION,
    )
    keys = [feature.key for feature in packed.features]
    told = {"inputs": packed.inputs, "keys": keys, "dims": dims}
    helper.set_model_props(made, {name: json.dumps(value) for name, value in told.items()})
    return made, graph.arrays


class _Tables:
    """Codes and codebooks as tensors of a graph, and how ids are looked up in them."""

    def __init__(self, graph: Graph, packed: PackedTables, ignores: bool) -> None:
        self.graph = graph
        self.ignores = ignores
        self.codes: dict[str, str] = {}
        self.rows: dict[str, list[str]] = {}
        starts = zip(packed.tables, packed.code_starts, packed.row_starts, strict=True)
        for table, code, row in starts:
            if table.code_bits:
                codes = unpacked_codes(table, packed.codes[code : code + table.code_bytes])
                self.codes[table.name] = graph.tensor(f"{table.name}/codes", codes)
            rows = packed.rows[row : row + table.row_bytes]
            self.rows[table.name] = self._stored(table, rows)

    def _stored(self, table: PackedTable, rows: torch.Tensor) -> list[str]:
        """The codebooks of all chunks, one after the other: values, and scales and biases if any.

        Of a CCE table these are values [rows, s] in float32, which a session makes once.
        """
        width, graph = table.row_type.row_bytes(table.chunk_dim), self.graph
        parts = table.row_type.parts(rows.view(-1, width), table.chunk_dim)
        names = ("rows", "scales", "biases")
        stored = [
            graph.tensor(f"{table.name}/{name}", part.numpy())
            for name, part in zip(names, parts, strict=False)
        ]
        # Codebooks are small, and plain tables stay as they are stored.
        return stored if table.plain else [self._as_float(stored)]

    def _as_float(self, parts: list[str]) -> str:
        values = self.graph.cast(parts[0], "FLOAT")
        if len(parts) == 1:
            return values
        scales, biases = (self.graph.cast(part, "FLOAT") for part in parts[1:])
        return self.graph.add("Add", self.graph.add("Mul", values, scales), biases)

    def vectors(self, ids: str, feature: PackedFeature, table: PackedTable) -> str:
        """The vectors [V, D] of `ids` [V] of a feature."""
        graph, rows = self.graph, self.rows[table.name]
        ids = self._checked(ids, feature, table)
        if table.plain:
            return self._as_float([graph.add("Gather", part, ids) for part in rows])
        main, helper = (
            self._in_order(rows, feature, table) if rows else "" for rows in self._rows(ids, table)
        )
        out = graph.add("Gather", rows[0], main)
        if helper:
            out = graph.add("Add", out, graph.add("Gather", rows[0], helper))
        # 0 is the size that there is: -1 would be any in an empty batch.
        return graph.add("Reshape", out, graph.number([0, table.dim]))

    def _in_order(self, rows: str, feature: PackedFeature, table: PackedTable) -> str:
        """`rows` [V, c] in the order in which the feature has its chunks."""
        if not feature.first_chunk:
            return rows
        order = np.roll(np.arange(table.num_chunks), -feature.first_chunk)
        return self.graph.add("Gather", rows, self.graph.number(order), axis=1)

    def _checked(self, ids: str, feature: PackedFeature, table: PackedTable) -> str:
        """The table's ids of those of a feature, none of which is out of bounds."""
        graph, size = self.graph, len(feature.ids)
        add, number = graph.add, graph.number
        if feature.raw_key is not None:
            key = number(feature.raw_key & _MASK, np.uint64)
            mix = mixed(graph, add("BitwiseXor", graph.cast(ids, "UINT64"), key))
            ids = add("Mod", _shifted(graph, mix, 1), number(size, np.uint64))
            ids = graph.cast(ids, "INT64")
        else:
            above = add("GreaterOrEqual", ids, number(size))
            bad = add("Or", add("Less", ids, number(0)), above)
            if self.ignores:
                ids = add("Where", bad, number(0), ids)
            else:
                # Reads beyond its data, which raises, and otherwise adds 0.
                name = f"table {table.name!r}, feature {feature.feature!r}: "
                name += f"an id is outside [0, {size})"
                zeros = add("Gather", number([0]), graph.cast(bad, "INT64"), name=name)
                ids = add("Add", ids, zeros)
        return add("Add", ids, number(feature.ids.start)) if feature.ids.start else ids

    def _rows(self, ids: str, table: PackedTable) -> tuple[str, str]:
        """Main rows [V, c] and helper rows [V, c] of a CCE table's ids, or "" if it has none."""
        graph = self.graph
        starts = np.arange(table.num_chunks) * table.rows_per_chunk
        hashes = np.array(table.hashes, np.int64).view(np.uint64).T  # [4, c]
        helper, mix = "", ""
        if table.is_hashed or table.helper_rows:
            mix = column(graph, mixed(graph, graph.cast(ids, "UINT64")))
        if table.is_hashed:
            main = hashed(graph, mix, hashes[:2], table.num_rows)
        else:
            main = graph.cast(graph.add("Gather", self.codes[table.name], ids), "INT64")
        main = graph.add("Add", main, graph.number(starts))
        if table.helper_rows:
            helper = hashed(graph, mix, hashes[2:], table.helper_rows)
            helper = graph.add("Add", helper, graph.number(starts + table.num_rows))
        return main, helper


def mixed(graph: Graph, ids: str) -> str:
    """What `codes.hashing.mix` gives for ids of type uint64, as uint64."""
    for shift, multiplier in _MIX:
        ids = graph.add("BitwiseXor", ids, _shifted(graph, ids, shift))
        ids = graph.add("Mul", ids, graph.number(multiplier, np.uint64))
    return graph.add("BitwiseXor", ids, _shifted(graph, ids, 31))


def hashed(graph: Graph, mix: str, hashes: np.ndarray[Any, Any], num_rows: int) -> str:
    """Rows in [0, num_rows) int64 [V, c] of mixed ids [V, 1], by `hashes` uint64 [2, c]."""
    bits = graph.add("Mul", mix, graph.number(hashes[0], np.uint64))
    bits = graph.add("Add", bits, graph.number(hashes[1], np.uint64))
    bits = graph.add("Mul", _shifted(graph, bits, 33), graph.number(num_rows, np.uint64))
    return graph.cast(_shifted(graph, bits, 31), "INT64")


def _shifted(graph: Graph, value: str, by: int) -> str:
    return graph.add("BitShift", value, graph.number(by, np.uint64), direction="RIGHT")


def unpacked_codes(table: PackedTable, stream: torch.Tensor) -> np.ndarray[Any, Any]:
    """Codes [N, c] of a table, in the smallest integers that hold its rows."""
    count, chunks = table.num_embeddings, table.num_chunks
    kinds = (np.uint8, np.uint16, np.int32)
    kind = next(kind for kind in kinds if table.num_rows - 1 <= np.iinfo(kind).max)
    out = np.empty((count, chunks), kind)
    packing = CodePacking(table.code_bits)
    for first in range(0, count, _BLOCK):
        own = min(_BLOCK, count - first)
        start = first * chunks * packing.bits // 8
        part = stream[start : start + packing.nbytes(own * chunks, 1)]
        # The last group of all may have been cut short.
        missing = packing.nbytes(own * chunks, 1) - len(part)
        part = torch.nn.functional.pad(part, (0, missing)).view(-1, packing.width)
        out[first : first + own] = packing.unpack(part, own * chunks).view(-1, chunks).numpy()
    return out
