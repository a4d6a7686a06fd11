"""Expansion in one Triton kernel for all tables, features and chunks of a lookup.

It compiles on CUDA, and under TRITON_INTERPRET=1 runs on the CPU, where tests compare it with the
torch form in expand.py. Each program takes a run of the batch's ids, finds the table of each by
a search in the features' starts, and writes its rows (and weights) of all chunks. Nothing here is
read back by the host.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

TABLE_FIELDS = 10
"""int64 per table: ids, address of codes, bytes of a code (0: hashed, -1: the id is the row),
columns of codes, main rows, helper rows, first feature, end of features, chunks, first chunk."""
CHUNK_FIELDS = 5
"""int64 per chunk: column, multiplier and addend of the main hash, of the helper hash."""
_VALUES = 256


@triton.jit
def _mix(ids):  # type: ignore[no-untyped-def]  # Triton's own types
    z = ids  # int64, whose right shifts are masked to be those of unsigned numbers
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return z ^ ((z >> 31) & 0x1FFFFFFFF)


@triton.jit
def _hashed(mixed, multiplier, addend, rows):  # type: ignore[no-untyped-def]
    return ((((mixed * multiplier + addend) >> 33) & 0x7FFFFFFF) * rows) >> 31


@triton.jit
def _code(address, cell, width, on):  # type: ignore[no-untyped-def]
    bytes_ = address.to(tl.pointer_type(tl.uint8))
    shorts = address.to(tl.pointer_type(tl.int16))
    words = address.to(tl.pointer_type(tl.int32))
    byte = tl.load(bytes_ + cell, mask=on & (width == 1), other=0).to(tl.int64)
    short = tl.load(shorts + cell, mask=on & (width == 2), other=0).to(tl.int64) & 0xFFFF
    word = tl.load(words + cell, mask=on & (width == 4), other=0).to(tl.int64)
    return byte + short + word


@triton.jit
def _expand(  # type: ignore[no-untyped-def]
    ids_ptr, weights_ptr, starts_ptr, table_of_ptr, tables_ptr, chunks_ptr, out_starts_ptr,
    out_ptr, out_weights_ptr, invalid_ptr, num_values, num_features,
    WEIGHTED: tl.constexpr, CHUNKS: tl.constexpr, STEPS: tl.constexpr, VALUES: tl.constexpr,
    TABLE_FIELDS: tl.constexpr, CHUNK_FIELDS: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * VALUES + tl.arange(0, VALUES)
    inside = at < num_values
    # The last feature that starts at or before each value; empty features are passed over.
    feature = tl.zeros((VALUES,), tl.int32)
    end = tl.zeros((VALUES,), tl.int32) + num_features
    for _ in range(STEPS):
        middle = (feature + end) // 2
        before = tl.load(starts_ptr + middle) <= at
        feature = tl.where(before, middle, feature)
        end = tl.where(before, end, middle)
    table = tl.load(table_of_ptr + feature)
    field = tables_ptr + table * TABLE_FIELDS
    num_embeddings, address = tl.load(field), tl.load(field + 1)
    width, columns = tl.load(field + 2), tl.load(field + 3)
    num_rows, helper_rows = tl.load(field + 4), tl.load(field + 5)
    first, last = tl.load(starts_ptr + tl.load(field + 6)), tl.load(starts_ptr + tl.load(field + 7))
    num_chunks, chunk = tl.load(field + 8), chunks_ptr + tl.load(field + 9) * CHUNK_FIELDS

    ids = tl.load(ids_ptr + at, mask=inside, other=0).to(tl.int64)
    bad = inside & ((ids < 0) | (ids >= num_embeddings))
    tl.atomic_add(invalid_ptr + table, tl.full((VALUES,), 1, tl.int64), mask=bad)
    ids = tl.where(bad, 0, ids)
    mixed = _mix(ids)
    has_helper = helper_rows > 0
    rows_per_id = tl.where(has_helper, 2, 1).to(tl.int64)
    to = tl.load(out_starts_ptr + table) + (at - first) * rows_per_id
    step = (last - first) * rows_per_id
    if WEIGHTED:
        weights = tl.load(weights_ptr + at, mask=inside, other=0)
    for j in range(CHUNKS):
        on = inside & (j < num_chunks)
        column = tl.load(chunk, mask=on, other=0)
        hashed = _hashed(mixed, tl.load(chunk + 1, mask=on, other=0),
                         tl.load(chunk + 2, mask=on, other=0), num_rows)  # fmt: skip
        main = _code(address, ids * columns + column, width, on)
        main = tl.where(width == 0, hashed, tl.where(width < 0, ids, main))
        helper = _hashed(mixed, tl.load(chunk + 3, mask=on, other=0),
                         tl.load(chunk + 4, mask=on, other=0), helper_rows)  # fmt: skip
        tl.store(out_ptr + to, main, mask=on)
        tl.store(out_ptr + to + 1, num_rows + helper, mask=on & has_helper)
        if WEIGHTED:
            tl.store(out_weights_ptr + to, weights, mask=on)
            tl.store(out_weights_ptr + to + 1, weights, mask=on & has_helper)
        to += step
        chunk += CHUNK_FIELDS


def expand(
    ids: torch.Tensor,
    weights: torch.Tensor | None,
    starts: torch.Tensor,
    table_of: torch.Tensor,
    tables: torch.Tensor,
    chunks: torch.Tensor,
    out_starts: torch.Tensor,
    out: torch.Tensor,
    out_weights: torch.Tensor | None,
    invalid: torch.Tensor,
    most_chunks: int,
) -> None:
    """Writes the rows of `ids` into `out`, and their weights into `out_weights`.

    Args:
        ids: int32 or int64 [V]; those out of bounds are read as 0.
        weights: [V], or None.
        starts: int64 [F + 1], where each feature's ids start.
        table_of: int64 [F], table of each feature.
        tables: int64 [T, TABLE_FIELDS].
        chunks: int64 [chunks of all tables, CHUNK_FIELDS].
        out_starts: int64 [T], where each table's rows start in `out`.
        out: int64; per table [chunks, its ids, rows per id].
        out_weights: like `out`, of the type of `weights`, or None.
        invalid: int64 [T]; ids out of bounds are added per table.
        most_chunks: of any table.
    """
    if not len(ids):
        return
    with torch.cuda.device_of(ids):
        _expand[(triton.cdiv(len(ids), _VALUES),)](
            ids, weights if weights is not None else ids, starts, table_of, tables, chunks,
            out_starts, out, out_weights if out_weights is not None else out, invalid,
            len(ids), len(table_of),
            WEIGHTED=weights is not None, CHUNKS=most_chunks, STEPS=len(table_of).bit_length(),
            VALUES=_VALUES, TABLE_FIELDS=TABLE_FIELDS, CHUNK_FIELDS=CHUNK_FIELDS,
        )  # fmt: skip
