"""How one table of a plain job is compressed: forms for a budget, the best, what it lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from cce_torchrec.byte_sizes import said_bytes
from cce_torchrec.checkpoint.plain_source import PlainTable
from cce_torchrec.clustering.imported import ImportReport, import_table
from cce_torchrec.config import CCEEmbeddingBagConfig
from cce_torchrec.modules.embedding_bag_collection import CCEEmbeddingBagCollection

MOST_ROWS = 1024
"""Of a chunk by default: K-means takes time by their square."""
_CHUNKS = (2, 4, 8, 16, 32, 64)
_SAMPLE = 16_384
"""Ids by which numbers of chunks are compared."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How large tables become: one of the first three."""

    table_bytes: int | None = None
    """Of all compressed tables together, codes counted; each has the same part of its own."""
    compression: float | None = None
    """Full over compressed bytes of each."""
    num_rows: int | None = None
    """Of the codebook of each chunk."""
    num_chunks: int | None = None
    """None tries some, and takes the one with the least error on a sample of the ids."""
    most_rows: int = MOST_ROWS
    """Where rows follow from bytes."""

    def __post_init__(self) -> None:
        given = [self.table_bytes, self.compression, self.num_rows]
        if sum(value is not None for value in given) != 1:
            raise ValueError("give exactly one of table_bytes, compression and num_rows")
        if any(value is not None and not value > 0 for value in (*given, self.num_chunks)):
            raise ValueError("budgets and num_chunks must be more than 0")
        if self.most_rows < 2:
            raise ValueError(f"most_rows {self.most_rows} must be 2 or more")

    def of(self, table: PlainTable, every: Sequence[PlainTable]) -> int | None:
        """Bytes for one of the tables that are compressed; None where rows are given."""
        if self.num_rows is not None:
            return None
        if self.compression is not None:
            return int(table.bytes / self.compression)
        return (self.table_bytes or 0) * table.bytes // sum(one.bytes for one in every)

    def holds(self, every: Sequence[PlainTable]) -> bool:
        """Whether all of the tables to compress may stay as they are."""
        full = sum(one.bytes for one in every)
        return self.table_bytes is not None and self.table_bytes >= full


@dataclass(frozen=True, kw_only=True)
class CompressedSaved:
    """What became of one table."""

    table: str
    bytes_before: int
    bytes: int
    """Codebooks and codes."""
    error: float | None
    """Sum of squared differences over sum of squares, of all ids; None: it stays as it was."""
    num_chunks: int = 0
    num_rows: int = 0
    code_bits: int = 0
    reason: str = ""
    """Why it stays as it was."""

    def __str__(self) -> str:
        if self.error is None:
            return f"{self.table}: stays at {said_bytes(self.bytes)}, {self.reason}"
        return (
            f"{self.table}: {said_bytes(self.bytes)} instead of {said_bytes(self.bytes_before)} "
            f"({self.bytes_before / self.bytes:.1f} times), {self.num_chunks} chunks of "
            f"{self.num_rows:,} rows, {self.code_bits}-bit codes, relative squared error "
            f"{self.error:.4f}"
        )

    def to_json(self) -> dict[str, Any]:
        """All of it, as JSON has it."""
        return asdict(self)


def forms(
    table: PlainTable, fields: Mapping[str, Any], budget: Budget, every: Sequence[PlainTable]
) -> list[CCEEmbeddingBagConfig]:
    """Forms of a table within the budget, one for each number of chunks; none that is no smaller,
    and none where the budget holds all tables as they are.

    Args:
        table: as it was saved.
        fields: of `EmbeddingBagConfig`.
        budget: of all tables.
        every: those that are compressed, among which bytes are divided.

    Raises:
        ValueError: the budget does not hold two rows a chunk.
    """
    if budget.holds(every):
        return []
    size, dim = budget.of(table, every), table.shape[1]
    if budget.num_chunks is not None:
        counts = [budget.num_chunks]
    else:
        counts = [c for c in _CHUNKS if dim % (4 * c) == 0] or [1] * (dim % 4 == 0)
    least, out = 0, []
    for chunks in counts:
        shape = {**fields, "num_chunks": chunks, "num_helper_rows": 0}
        least = least or CCEEmbeddingBagConfig(num_rows=2, **shape).table_bytes
        rows = _rows(table, shape, budget, size)
        if rows >= 2:
            config = CCEEmbeddingBagConfig(num_rows=rows, **shape)
            out += [config] if config.table_bytes < table.bytes else []
    # Else a table that is small already, and better left as it is.
    if not out and size is not None and size < min(least, table.bytes):
        raise ValueError(
            f"table {table.full_name!r}: {said_bytes(size)} do not hold two rows a chunk, which "
            f"take {said_bytes(least)} with codes; give more bytes"
        )
    return out


def _rows(table: PlainTable, shape: Mapping[str, Any], budget: Budget, size: int | None) -> int:
    """The most rows a chunk whose bytes with codes are within `size`, or those of the budget."""
    if size is None:
        return min(budget.num_rows or 0, table.shape[0])
    # Bytes never fall where rows are added, though codes grow in steps.
    low, high = 0, min(budget.most_rows, table.shape[0])
    while low < high:
        middle = (low + high + 1) // 2
        config = CCEEmbeddingBagConfig(num_rows=middle, **shape)
        low, high = (middle, high) if config.table_bytes <= size else (low, middle - 1)
    return low


def best(weight: Any, candidates: Sequence[CCEEmbeddingBagConfig]) -> CCEEmbeddingBagConfig:
    """Of forms of one size that with the least error on a sample of the ids."""
    if len(candidates) == 1:
        return candidates[0]
    # Evenly spread, as neighbouring ids may be alike.
    step = -(-len(weight) // _SAMPLE)
    sample = torch.as_tensor(weight[::step]).float()
    errors = []
    for config in candidates:
        own = CCEEmbeddingBagConfig(
            name=config.name,
            num_embeddings=len(sample),
            embedding_dim=config.embedding_dim,
            num_chunks=config.num_chunks,
            # As many ids a row as all ids have would be more than the sample has.
            num_rows=min(config.num_rows, max(2, len(sample) // 16)),
            num_helper_rows=0,
        )
        report = import_table(CCEEmbeddingBagCollection([own]), own.name, sample, iterations=8)
        errors.append(report.error)
    return candidates[errors.index(min(errors))]


def stays(table: PlainTable, reason: str) -> CompressedSaved:
    """What is said of a table that is not compressed."""
    return CompressedSaved(
        table=table.full_name,
        bytes_before=table.bytes,
        bytes=table.bytes,
        error=None,
        reason=reason,
    )


def compressed_to(
    table: PlainTable, config: CCEEmbeddingBagConfig, report: ImportReport
) -> CompressedSaved:
    """What is said of one that is."""
    return CompressedSaved(
        table=table.full_name,
        bytes_before=table.bytes,
        bytes=config.table_bytes,
        error=report.error,
        num_chunks=config.num_chunks,
        num_rows=config.num_rows,
        code_bits=config.code_bits,
    )
