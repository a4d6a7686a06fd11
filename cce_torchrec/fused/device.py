"""The tables of one lookup as the Triton kernel reads them, kept on the device between batches."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Table:
    """One table of a lookup; its features follow one another in the input."""

    num_embeddings: int
    codes: torch.Tensor | None
    """[N, c] in storage type, None where the code is a hash."""
    plain: bool
    """The id is the row."""
    num_rows: int
    helper_rows: int
    num_features: int
    chunks: tuple[tuple[int, ...], ...]
    """Per chunk: column of `codes`, multiplier and addend of the main and the helper hash."""

    @property
    def copies(self) -> int:
        """Rows per id, all chunks together."""
        return len(self.chunks) * (2 if self.helper_rows else 1)


@functools.cache
def available() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def takes(ids: torch.Tensor) -> bool:
    """Whether the kernel runs on these ids: on CUDA, or on a CPU that interprets Triton."""
    on = ids.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    return on and ids.dtype in (torch.int32, torch.int64) and ids.is_contiguous() and available()


class DeviceTables:
    """The tables of one lookup, described to the kernel on its device."""

    def __init__(self, tables: Sequence[Table], device: torch.device) -> None:
        rows: list[list[int]] = []
        chunks: list[tuple[int, ...]] = []
        table_of: list[int] = []
        for i, table in enumerate(tables):
            codes, feature = table.codes, len(table_of)
            width = -1 if table.plain else 0 if codes is None else codes.element_size()
            address, columns = (0, 0) if codes is None else (codes.data_ptr(), codes.shape[1])
            rows.append(
                [
                    *(table.num_embeddings, address, width, columns),
                    *(table.num_rows, table.helper_rows),
                    *(feature, feature + table.num_features),
                    *(len(table.chunks), len(chunks)),
                ]
            )
            chunks += table.chunks
            table_of += [i] * table.num_features
        self._tables = torch.tensor(rows, device=device)
        self._chunks = torch.tensor(chunks, device=device)
        self._table_of = torch.tensor(table_of, device=device)
        self._copies = torch.tensor([table.copies for table in tables], device=device)
        self._most_chunks = max(len(table.chunks) for table in tables)
        copies = {table.copies for table in tables}
        self.copies = copies.pop() if len(copies) == 1 else None
        """Rows per id, if it is one number for all tables."""
        self.invalid = torch.zeros(len(tables), dtype=torch.int64, device=device)
        """Ids out of bounds so far, per table."""

    def expand(
        self,
        ids: torch.Tensor,
        weights: torch.Tensor | None,
        starts: torch.Tensor,
        num_out: int,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Rows (int64 [num_out]) and weights of `ids`, whose features start at `starts` [F + 1]."""
        from cce_torchrec.fused import triton_kernel

        out = torch.empty(num_out, dtype=torch.int64, device=ids.device)
        out_weights = weights.new_empty(num_out) if weights is not None else None
        sizes = (starts[self._tables[:, 7]] - starts[self._tables[:, 6]]) * self._copies
        triton_kernel.expand(
            ids=ids,
            weights=weights.contiguous() if weights is not None else None,
            starts=starts.contiguous(),
            table_of=self._table_of,
            tables=self._tables,
            chunks=self._chunks,
            out_starts=sizes.cumsum(0) - sizes,
            out=out,
            out_weights=out_weights,
            invalid=self.invalid,
            most_chunks=self._most_chunks,
        )
        return out, out_weights
