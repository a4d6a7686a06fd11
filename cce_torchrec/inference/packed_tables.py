"""The tables of a collection as serving keeps them: two flat tensors, and what describes them.

Codes lie id after id, those of an id chunk after chunk, `code_bits` bits each and none between, the
lowest bit of a byte first; an id's are one word where they fit. Codebook rows are as FBGEMM reads
them (`row_types.py`). Nothing is kept that can be computed: hashes are, and so are
codes that were never learned.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from cce_torchrec.codes.chunk_codes import ChunkCodes, codes_of
from cce_torchrec.codes.hashing import code_hash, helper_hash, raw_id_key
from cce_torchrec.inference.row_types import RowType
from cce_torchrec.lookup.output import LogicalOutput
from cce_torchrec.modules.embedding_bag_collection import CCEEmbeddingBagCollection
from cce_torchrec.table import Table, physical_table

_BLOCK = 1 << 18
"""Ids at a time; a multiple of 8, so that each block begins a byte."""
WORD = 8
"""Codes of a table begin at a multiple of so many bytes."""


@dataclass(frozen=True, kw_only=True)
class PackedTable:
    """One table, CCE or plain, which is one chunk whose rows are its ids."""

    name: str
    num_embeddings: int
    dim: int
    num_chunks: int
    num_rows: int
    """Of the main codebook of a chunk."""
    helper_rows: int
    """Of the helper codebook of a chunk, which come after these; 0: it has none."""
    code_bits: int
    """Of a stored code; 0: the code is a hash, or the id of a plain table."""
    plain: bool
    hashes: tuple[tuple[int, int, int, int], ...]
    """Of each chunk, multiplier and addend of the main hash and of the helper hash."""
    row_type: RowType
    code_bytes: int
    row_bytes: int
    """Of all codebooks."""

    def check(self) -> None:
        """Raises ValueError if its numbers contradict each other."""
        codes = -(-self.num_embeddings * self.num_chunks * self.code_bits // 8)
        rows = self.rows_per_chunk * self.row_type.row_bytes(self.chunk_dim)
        hashes = 0 if self.plain else self.num_chunks
        if (self.code_bytes, self.row_bytes, len(self.hashes)) != (
            codes,
            self.num_chunks * rows,
            hashes,
        ):
            raise ValueError(f"table {self.name!r} is described by numbers that do not fit")

    @property
    def chunk_dim(self) -> int:
        """Width of a chunk."""
        return self.dim // self.num_chunks

    @property
    def rows_per_chunk(self) -> int:
        """Main and helper rows of a chunk."""
        return self.num_rows + self.helper_rows

    @property
    def is_hashed(self) -> bool:
        """Whether main rows are hashes."""
        return not self.plain and not self.code_bits

    @property
    def rows_per_id(self) -> int:
        """That an id reads of a chunk."""
        return 2 if self.helper_rows else 1


@dataclass(frozen=True, kw_only=True)
class PackedFeature:
    """A feature of a table, as the output has it."""

    key: str
    """In the output."""
    feature: str
    """In the batch."""
    table: int
    """Number of its table."""
    ids: range
    """Which ids of the table are its own."""
    raw_key: int | None
    """What raw ids are hashed with; None where ids are not hashed."""
    mean: bool
    """Whether the sum of a bag is divided by its length."""
    first_chunk: int = 0
    """The chunk that the embeddings begin with; those before it come last."""


@dataclass(frozen=True, kw_only=True)
class PackedTables:
    """All tables of a collection."""

    tables: list[PackedTable]
    features: list[PackedFeature]
    """In the order of the output."""
    codes: torch.Tensor
    """uint8, packed, each table's from a multiple of `WORD` bytes on, with one more word."""
    rows: torch.Tensor
    """uint8: table after table, chunk after chunk, main rows before helper rows."""
    is_weighted: bool

    def __post_init__(self) -> None:
        # Lookups read by these numbers without a look, and a folder may say anything.
        for feature in self.features:
            own = self.tables[feature.table]
            if not 0 <= feature.ids.start <= feature.ids.stop <= own.num_embeddings:
                raise ValueError(f"feature {feature.key!r} reads ids that {own.name!r} has not")
            if not 0 <= feature.first_chunk < own.num_chunks:
                raise ValueError(f"feature {feature.key!r} begins with no chunk of {own.name!r}")
        for table in self.tables:
            table.check()
        codes = sum(_whole_words(table.code_bytes) for table in self.tables) + WORD
        rows = sum(table.row_bytes for table in self.tables)
        if (len(self.codes), len(self.rows)) != (codes, rows):
            raise ValueError(
                f"{len(self.codes)} bytes of codes and {len(self.rows)} of rows are those of other "
                f"tables, which have {codes} and {rows}"
            )

    @property
    def inputs(self) -> list[str]:
        """Features of a batch, each once, in the order in which the output first has them."""
        return list(dict.fromkeys(feature.feature for feature in self.features))

    @property
    def tables_of_features(self) -> list[PackedTable]:
        """The table of each of `features`."""
        return [self.tables[feature.table] for feature in self.features]

    @property
    def code_starts(self) -> list[int]:
        """The byte of `codes` with which each table begins."""
        return _starts([_whole_words(table.code_bytes) for table in self.tables])

    @property
    def row_starts(self) -> list[int]:
        """The byte of `rows` with which each table begins."""
        return _starts([table.row_bytes for table in self.tables])

    def only(self, number: int, *, is_weighted: bool = False) -> PackedTables:
        """The feature `number` alone with its table, of which nothing is copied.

        `is_weighted`: whether its bags are pooled by weights, which single ids need not.
        """
        feature = self.features[number]
        table, code, row = self.tables[feature.table], *self._starts_of(feature.table)
        return PackedTables(
            tables=[table],
            features=[replace(feature, table=0)],
            codes=self.codes[code : code + _whole_words(table.code_bytes) + WORD],
            rows=self.rows[row : row + table.row_bytes],
            is_weighted=is_weighted,
        )

    def _starts_of(self, table: int) -> tuple[int, int]:
        return self.code_starts[table], self.row_starts[table]

    @classmethod
    def of(cls, collection: CCEEmbeddingBagCollection, row_type: RowType) -> PackedTables:
        """What serving keeps of a trained `collection`, its rows stored as `row_type`."""
        if not collection.tables:
            raise ValueError("the collection has no tables to pack")
        collection.restore_main()  # which an optimizer may have moved since the last lookup
        bags = collection.embedding_bag_collection.embedding_bags
        tables, codes, rows = [], [], []
        hidden = not sys.stderr.isatty()
        for table in tqdm(collection.tables, "packing", leave=False, unit="table", disable=hidden):
            check_width(table, row_type)
            own = codes_of(collection.codes, table.name)
            stored = _stored_codes(own)
            packed = [row_type.packed(weight) for weight in _weights(table, bags)]
            if not all(map(row_type.is_finite, packed)):
                raise ValueError(
                    f"table {table.name!r} has values that are too large for {row_type.name} "
                    "(its scales are float16); use fp32"
                )
            tables.append(_described(table, own, stored, packed, row_type))
            codes.append(_in_words(stored))
            rows += [part.view(-1) for part in packed]
        return cls(
            tables=tables,
            features=_features(collection.tables, collection.output),
            # A reader of words may read one that begins in the last byte.
            codes=torch.cat([*codes, torch.zeros(WORD, dtype=torch.uint8)]),
            rows=torch.cat(rows),
            is_weighted=collection.is_weighted(),
        )


def check_width(table: Table, row_type: RowType) -> None:
    """Raises ValueError if FBGEMM does not pack rows of the table's width as `row_type`."""
    width = table.config.embedding_dim // len(table.chunks)
    if width * row_type.bits % 16:
        raise ValueError(
            f"table {table.name!r}: {width} values of {row_type.name} are no whole number of 16 "
            "bits, in which FBGEMM packs rows; use a wider data_type"
        )


def _weights(table: Table, bags: nn.ModuleDict) -> Iterator[torch.Tensor]:
    """Of each chunk.

    Raises:
        ValueError: naming the table, if any value is not finite.
    """
    for chunk in table.chunks:
        bag: Any = bags[table.name if chunk is None else physical_table(table.name, chunk)]
        if not bag.weight.is_floating_point():
            raise ValueError(
                f"table {table.name!r} is quantised already; pack the model before it is quantised"
            )
        if not bool(torch.isfinite(bag.weight).all()):
            raise ValueError(
                f"table {table.name!r} has NaN or infinite values; serve an earlier checkpoint"
            )
        yield bag.weight


def _stored_codes(codes: ChunkCodes | None) -> torch.Tensor | None:
    """Those that are no hash, as one stream of bits; uint8 [bytes]."""
    # Before the first clustering all codes are hashes, which are computed as fast as read.
    if codes is None or codes.codes is None or not codes.num_clusterings:
        return None
    # Training packs groups of ids chunk by chunk, which are read by a word for each chunk.
    packed, packing, ids = codes.codes.detach().cpu(), codes.packing, len(codes.ids)
    out = torch.empty(-(-ids * len(codes.chunks) * packing.bits // 8), dtype=torch.uint8)
    for first in range(0, ids, _BLOCK):
        own = min(_BLOCK, ids - first)
        rows = packed[first // packing.group : packing.rows(first + own)]
        # As codes of one chunk they follow each other without a gap.
        stream = packing.pack(packing.unpack(rows, own).view(-1, 1)).view(-1)
        start = first * len(codes.chunks) * packing.bits // 8
        out[start : start + len(stream)] = stream[: len(out) - start]
    return out


def _described(
    table: Table,
    codes: ChunkCodes | None,
    stored: torch.Tensor | None,
    packed: list[torch.Tensor],
    row_type: RowType,
) -> PackedTable:
    config, cce = table.config, table.cce
    hashes = []
    # By the number of clusterings, from which each helper's hash follows.
    if codes is not None and cce is not None:
        for chunk in range(cce.num_chunks):
            main = code_hash(cce.seed, cce.name, chunk)
            helper = helper_hash(cce.seed, cce.name, chunk, codes.num_clusterings)
            hashes.append((main.multiplier, main.addend, helper.multiplier, helper.addend))
    return PackedTable(
        name=table.name,
        num_embeddings=config.num_embeddings,
        dim=config.embedding_dim,
        num_chunks=len(table.chunks),
        num_rows=cce.num_rows if cce is not None else config.num_embeddings,
        helper_rows=cce.helper_rows if cce is not None else 0,
        code_bits=codes.packing.bits if codes is not None and stored is not None else 0,
        plain=cce is None,
        hashes=tuple(hashes),
        row_type=row_type,
        code_bytes=0 if stored is None else stored.numel(),
        row_bytes=sum(part.numel() for part in packed),
    )


def _features(tables: list[Table], output: LogicalOutput) -> list[PackedFeature]:
    """The features of the output, in its order."""
    number = {table.name: i for i, table in enumerate(tables)}
    out = []
    for i in output.order:
        slot = output.slots[i]
        config, cce = tables[number[slot.table]].config, tables[number[slot.table]].cce
        ids, key = range(config.num_embeddings), None
        if cce is not None and cce.id_ranges:
            ids = cce.id_ranges[slot.feature]
        # Features that share a range share what their raw ids are hashed with.
        if cce is not None and cce.hash_ids:
            key = raw_id_key(cce.seed, f"{cce.name}#{ids.start}" if cce.id_ranges else cce.name)
        out.append(
            PackedFeature(
                key=output.names[i],
                feature=slot.feature,
                table=number[slot.table],
                ids=ids,
                raw_key=key,
                mean=output.pooling[i].name == "MEAN",
                first_chunk=tables[number[slot.table]].chunks_of(slot.feature)[0] or 0,
            )
        )
    return out


def _whole_words(nbytes: int) -> int:
    return -(-nbytes // WORD) * WORD


def _in_words(stored: torch.Tensor | None) -> torch.Tensor:
    if stored is None:
        return torch.zeros(0, dtype=torch.uint8)
    flat = stored.reshape(-1)
    return torch.nn.functional.pad(flat, (0, _whole_words(len(flat)) - len(flat)))


def _starts(sizes: list[int]) -> list[int]:
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + size)
    return starts[:-1]
