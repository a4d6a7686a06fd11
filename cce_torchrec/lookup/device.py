"""The tables of one lookup as the Triton kernels read them, kept on the device between batches."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from cce_torchrec import compiled
from cce_torchrec.gpu.usable import usable
from cce_torchrec.packing import CodePacking

if TYPE_CHECKING:  # Triton may not be installed
    from cce_torchrec.lookup.triton_expand import Bags

_BYTES = compiled.Pointer(torch.uint8)
_INT64 = compiled.Pointer(torch.int64)
_NO_POSITION = torch.iinfo(torch.int64).max


@dataclass(frozen=True, kw_only=True)
class Table:
    """One table of a lookup; its features follow one another in the input."""

    num_embeddings: int
    num_features: int
    codes: torch.Tensor | None = None
    """Packed, None where the code is a hash."""
    code_bits: int = 0
    plain: bool = False
    """The id is the row."""
    num_rows: int = 0
    helper_rows: int = 0
    chunks: tuple[tuple[int, ...], ...] = ((0, 0, 0, 0, 0),)
    """Per chunk: column of `codes`, multiplier and addend of the main and the helper hash. A plain
    table has one, and hashes nothing."""
    raw_id_key: int | None = None
    """What raw ids are hashed with; None where ids are not hashed."""
    seen: torch.Tensor | None = None
    """Bits of seen ids, uint8 in whole words of 4 bytes, where they are to be marked."""

    counts: torch.Tensor | None = None
    """Counts of ids, where they are to be counted."""
    batches: torch.Tensor | None = None
    """int64 scalar, the number of the batch that is counted."""
    count_state: int = 0
    """What the hashes of its batches start from."""

    @property
    def rows_per_id(self) -> int:
        """Rows per id and chunk."""
        return 2 if self.helper_rows else 1

    @property
    def copies(self) -> int:
        """Rows per id, all chunks together."""
        return len(self.chunks) * self.rows_per_id


@dataclass(frozen=True)
class Rows:
    """What an expansion gives: rows [R] of all bags, their weights, and their bags."""

    values: torch.Tensor
    weights: torch.Tensor | None
    offsets: torch.Tensor
    """Of the type of the rows, [bags of all physical features + 1]."""


def takes(ids: torch.Tensor) -> bool:
    """Whether the kernels run on these ids: on CUDA, or on a CPU that interprets Triton."""
    return ids.dtype in (torch.int32, torch.int64) and ids.is_contiguous() and usable(ids.device)


class DeviceTables:
    """The tables of one lookup, described to the kernels on their device."""

    def __init__(self, tables: Sequence[Table], device: torch.device) -> None:
        rows: list[list[int]] = []
        chunks: list[tuple[int, ...]] = []
        table_of: list[int] = []
        features: list[list[int]] = []
        for i, table in enumerate(tables):
            codes, slot = table.codes, len(table_of)
            # Codes go by their address: their bits differ, and one launch takes all tables.
            bits = -1 if table.plain else 0 if codes is None else table.code_bits
            packing, address, stride = CodePacking(max(0, bits)), 0, 0
            if codes is not None:
                address, stride = _BYTES.address(codes, device), codes.shape[1]
            rows.append(
                [
                    table.num_embeddings,
                    address,
                    bits,
                    stride,
                    table.num_rows,
                    table.helper_rows,
                    slot,
                    slot + table.num_features,
                    len(table.chunks),
                    len(chunks),
                    int(table.raw_id_key is not None),
                    table.raw_id_key or 0,
                    0 if table.seen is None else _BYTES.address(table.seen, device),
                    table.copies,
                    packing.group.bit_length() - 1,
                    packing.width,
                    0 if table.counts is None else _BYTES.address(table.counts, device),
                    0 if table.batches is None else _INT64.address(table.batches, device),
                    table.count_state,
                ]
            )
            chunks += table.chunks
            table_of += [i] * table.num_features
            features += [
                [slot + f, i, j, table.rows_per_id]
                for j in range(len(table.chunks))
                for f in range(table.num_features)
            ]
        from cce_torchrec.lookup.triton_expand import Lookup  # here: Triton may not be installed

        self._lookup = Lookup(rows, chunks, features, table_of, device)
        self.most_copies = self._lookup.most_copies

    def expand(
        self,
        ids: torch.Tensor,
        weights: torch.Tensor | None,
        bags: Bags,
        num_out: int,
        dtype: torch.dtype,
        invalid: torch.Tensor | None,
        first_bad: torch.Tensor | None,
        exact: bool,
    ) -> Rows:
        """Rows, weights and bags of `ids`.

        Args:
            ids: int32 or int64 [V].
            weights: [V], or None.
            bags: of ids.
            num_out: rows to make room for; of all values in bags, or more.
            dtype: of rows and offsets, int64, or int32 if `num_out` and every row fit.
            invalid: int64 [tables], to which ids out of bounds are added, or None.
            first_bad: int64 [tables], see `no_positions`, or None.
            exact: whether `num_out` is that of all values in bags.
        """
        from cce_torchrec.lookup.triton_expand import expand

        out = Rows(
            ids.new_empty(num_out, dtype=dtype),
            None if weights is None else weights.new_empty(num_out),
            ids.new_empty(bags.num_out + 1, dtype=dtype),
        )
        expand(
            self._lookup,
            ids,
            None if weights is None else weights.contiguous(),
            bags,
            out=out.values,
            out_weights=out.weights,
            offsets=out.offsets,
            invalid=invalid,
            first_bad=first_bad,
            exact=exact,
        )
        return out

    def bags_of(self, features: KeyedJaggedTensor, slots: Sequence[int]) -> Bags:
        """The bags of `features` for `expand`; `slots`: of each physical feature."""
        from cce_torchrec.lookup.triton_expand import Bags

        offsets = features.offsets()
        if not features.variable_stride_per_key():
            stride = features.stride()
            return Bags(offsets, stride, num_out=len(slots) * stride)
        sizes = features.stride_per_key()
        out_sizes = [sizes[slot] for slot in slots]
        return Bags(
            offsets,
            1,
            starts_of(sizes, offsets.device),
            starts_of(out_sizes, offsets.device),
            num_out=sum(out_sizes),
        )


def starts_of(sizes: Sequence[int], device: torch.device) -> torch.Tensor:
    """Where parts of `sizes` start and the last one ends, int64 [len(sizes) + 1] on `device`."""
    starts = torch.tensor(list(itertools.accumulate(sizes, initial=0)))
    # The host waits for a copy to a GPU unless it is from pinned memory.
    if device.type == "cuda":
        starts = starts.pin_memory()
    return starts.to(device, non_blocking=True)


def no_positions(tables: int, device: torch.device) -> torch.Tensor:
    """int64 [tables] beyond every position, for the lowest position of a bad id of each table."""
    return torch.full((tables,), _NO_POSITION, dtype=torch.int64, device=device)
