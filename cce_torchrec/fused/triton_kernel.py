"""Expansion in Triton: all tables, features, chunks and options of a lookup in three launches.

It compiles on CUDA, and under TRITON_INTERPRET=1 runs on the CPU, where tests compare it with the
torch form in expand.py. Nothing here is read back by the host.

1. `_starts`, one program: where each feature's ids start in the batch, and each table's rows in
   the output.
2. `_expand`: each program takes a run of the batch's ids, finds the table of each by a search in
   the features' starts, hashes raw ids, checks bounds, marks seen ids, and writes rows (and
   weights) of all chunks.
3. `_bags`: lengths and offsets of the bags of rows.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from cce_torchrec.gpu.launch import launch
from cce_torchrec.gpu.triton_functions import code_at, hashed, mix

TABLE_FIELDS = 14
"""int64 per table: ids, address of codes, bytes of a code (0: hashed, -1: the id is the row),
columns of codes, main rows, helper rows, first feature, end of features, chunks, first chunk,
whether ids are raw, the key that raw ids are hashed with, address of the bits of seen ids (0: they
are not marked), rows per id of all chunks together."""
CHUNK_FIELDS = 5
"""int64 per chunk: column, multiplier and addend of the main hash, of the helper hash."""
FEATURE_FIELDS = 4
"""int64 per physical feature: the slot it reads, its table, its chunk in the table, rows per id."""
_VALUES, _WARPS = 256, 8
"""Ids of a program and its warps: with 4 warps, 95 registers and 29 barriers, with 8 neither."""
_BAGS = 1024


@triton.jit
def _mark(address, ids, on):  # type: ignore[no-untyped-def]
    # Most bits of popular ids are set already: looking first spares most of the atomics.
    word = address.to(tl.pointer_type(tl.int32)) + (ids >> 5)
    bit = (tl.full(ids.shape, 1, tl.int32) << (ids & 31).to(tl.int32)).to(tl.int32)
    held = tl.load(word, mask=on, other=-1)
    tl.atomic_or(word, bit, mask=on & ((held & bit) == 0))


@triton.jit
def _first_bag(feature, bag_starts_ptr, stride, mask, VARIABLE: tl.constexpr):  # type: ignore[no-untyped-def]
    if VARIABLE:
        return tl.load(bag_starts_ptr + feature, mask=mask, other=0)
    else:
        return feature.to(tl.int64) * stride


@triton.jit
def _last_at(starts_ptr, at, count, STEPS: tl.constexpr):  # type: ignore[no-untyped-def]
    # The last of `count` rising starts that is at or before each of `at`; empty ones are passed.
    found = tl.zeros(at.shape, tl.int32)
    end = tl.zeros(at.shape, tl.int32) + count
    for _ in range(STEPS):
        middle = (found + end) // 2
        before = tl.load(starts_ptr + middle) <= at
        found = tl.where(before, middle, found)
        end = tl.where(before, end, middle)
    return found


@triton.jit
def _starts(  # type: ignore[no-untyped-def]
    offsets_ptr, bag_starts_ptr, tables_ptr, starts_ptr, out_starts_ptr, num_features, num_tables,
    stride, FEATURES: tl.constexpr, TABLES: tl.constexpr, TABLE_FIELDS: tl.constexpr,
    VARIABLE: tl.constexpr,
):  # fmt: skip
    feature = tl.arange(0, FEATURES)
    known = feature <= num_features
    bag = _first_bag(feature, bag_starts_ptr, stride, known, VARIABLE)
    start = tl.load(offsets_ptr + bag, mask=known, other=0)
    tl.store(starts_ptr + feature, start.to(tl.int64), mask=known)
    table = tl.arange(0, TABLES)
    real = table < num_tables
    field = tables_ptr + table * TABLE_FIELDS
    first = tl.load(field + 6, mask=real, other=0)
    last = tl.load(field + 7, mask=real, other=0)
    bag = _first_bag(last, bag_starts_ptr, stride, real, VARIABLE)
    ids = tl.load(offsets_ptr + bag, mask=real, other=0).to(tl.int64)
    bag = _first_bag(first, bag_starts_ptr, stride, real, VARIABLE)
    ids -= tl.load(offsets_ptr + bag, mask=real, other=0).to(tl.int64)
    ends = tl.cumsum(ids * tl.load(field + 13, mask=real, other=0), axis=0)
    tl.store(out_starts_ptr + 1 + table, ends, mask=real)
    tl.store(out_starts_ptr + table, tl.zeros((TABLES,), tl.int64), mask=table == 0)


@triton.jit
def _expand(  # type: ignore[no-untyped-def]
    ids_ptr, weights_ptr, starts_ptr, table_of_ptr, tables_ptr, chunks_ptr, out_starts_ptr,
    out_ptr, out_weights_ptr, invalid_ptr, first_bad_ptr, num_values, num_features,
    WEIGHTED: tl.constexpr, CHUNKS: tl.constexpr, STEPS: tl.constexpr, VALUES: tl.constexpr,
    RAW: tl.constexpr, MARK: tl.constexpr, COUNT: tl.constexpr, FIRST_BAD: tl.constexpr,
    TABLE_FIELDS: tl.constexpr, CHUNK_FIELDS: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * VALUES + tl.arange(0, VALUES)
    # A batch may have values beyond its last bag, which belong to no table.
    inside = (at < num_values) & (at < tl.load(starts_ptr + num_features))
    feature = _last_at(starts_ptr, at, num_features, STEPS)
    table = tl.load(table_of_ptr + feature, mask=inside, other=0)
    field = tables_ptr + table * TABLE_FIELDS
    num_embeddings, address = tl.load(field), tl.load(field + 1)
    width, columns = tl.load(field + 2), tl.load(field + 3)
    num_rows, helper_rows = tl.load(field + 4), tl.load(field + 5)
    first, last = tl.load(starts_ptr + tl.load(field + 6)), tl.load(starts_ptr + tl.load(field + 7))
    num_chunks, chunk = tl.load(field + 8), chunks_ptr + tl.load(field + 9) * CHUNK_FIELDS

    ids = tl.load(ids_ptr + at, mask=inside, other=0).to(tl.int64)
    if RAW:
        # As hashing.hash_ids: the remainder of the upper 63 bits of the id's mix with the key.
        raw = (mix(ids ^ tl.load(field + 11)) >> 1) & 0x7FFFFFFFFFFFFFFF
        ids = tl.where(tl.load(field + 10) != 0, raw % num_embeddings, ids)
    bad = inside & ((ids < 0) | (ids >= num_embeddings))
    if COUNT:
        tl.atomic_add(invalid_ptr + table, tl.full((VALUES,), 1, tl.int64), mask=bad)
    if FIRST_BAD:
        tl.atomic_min(first_bad_ptr + table, at, mask=bad)
    ids = tl.where(bad, 0, ids)
    if MARK:
        seen = tl.load(field + 12)
        _mark(seen, ids, inside & (seen != 0))
    mixed = mix(ids)
    has_helper = helper_rows > 0
    rows_per_id = tl.where(has_helper, 2, 1).to(tl.int64)
    to = tl.load(out_starts_ptr + table) + (at - first) * rows_per_id
    step = (last - first) * rows_per_id
    if WEIGHTED:
        weights = tl.load(weights_ptr + at, mask=inside, other=0)
    for j in range(CHUNKS):
        on = inside & (j < num_chunks)
        column = tl.load(chunk, mask=on, other=0)
        code = hashed(mixed, tl.load(chunk + 1, mask=on, other=0),
                      tl.load(chunk + 2, mask=on, other=0), num_rows)  # fmt: skip
        main = code_at(address, ids * columns + column, width, on)
        main = tl.where(width == 0, code, tl.where(width < 0, ids, main))
        helper = hashed(mixed, tl.load(chunk + 3, mask=on, other=0),
                        tl.load(chunk + 4, mask=on, other=0), helper_rows)  # fmt: skip
        tl.store(out_ptr + to, main, mask=on)
        tl.store(out_ptr + to + 1, num_rows + helper, mask=on & has_helper)
        if WEIGHTED:
            tl.store(out_weights_ptr + to, weights, mask=on)
            tl.store(out_weights_ptr + to + 1, weights, mask=on & has_helper)
        to += step
        chunk += CHUNK_FIELDS


@triton.jit
def _bags(  # type: ignore[no-untyped-def]
    offsets_ptr, bag_starts_ptr, out_bag_starts_ptr, starts_ptr, features_ptr, tables_ptr,
    out_starts_ptr, lengths_ptr, out_ptr, num_bags, num_features, num_tables, stride,
    BAGS: tl.constexpr, STEPS: tl.constexpr, FEATURE_FIELDS: tl.constexpr,
    TABLE_FIELDS: tl.constexpr, VARIABLE: tl.constexpr,
):  # fmt: skip
    bag = tl.program_id(0).to(tl.int64) * BAGS + tl.arange(0, BAGS)
    real = bag < num_bags
    if VARIABLE:
        number = tl.where(real, _last_at(out_bag_starts_ptr, bag, num_features, STEPS), 0)
        within = bag - tl.load(out_bag_starts_ptr + number)
    else:
        number = tl.where(real, bag // stride, 0)
        within = bag % stride
    feature = features_ptr + number * FEATURE_FIELDS
    slot, table = tl.load(feature), tl.load(feature + 1)
    chunk, rows = tl.load(feature + 2), tl.load(feature + 3)
    at = _first_bag(slot, bag_starts_ptr, stride, real, VARIABLE) + within
    start = tl.load(offsets_ptr + at, mask=real, other=0).to(tl.int64)
    length = tl.load(offsets_ptr + at + 1, mask=real, other=0).to(tl.int64) - start
    field = tables_ptr + table * TABLE_FIELDS
    first, last = tl.load(starts_ptr + tl.load(field + 6)), tl.load(starts_ptr + tl.load(field + 7))
    begins = tl.load(out_starts_ptr + table) + (chunk * (last - first) + start - first) * rows
    tl.store(lengths_ptr + bag, length * rows, mask=real)
    tl.store(out_ptr + bag, begins, mask=real)
    tl.store(out_ptr + bag, tl.load(out_starts_ptr + num_tables), mask=bag == num_bags)


@dataclass(frozen=True)
class Bags:
    """The bags of a batch: `stride` of every feature, or else as many as the starts say."""

    offsets: torch.Tensor
    """int32 or int64 [bags + 1], of all features' bags one after the other."""
    stride: int
    starts: torch.Tensor | None = None
    """int64 [F + 1], where the bags of each feature start, where they differ in number."""
    out_starts: torch.Tensor | None = None
    """int64 [P + 1], likewise of each physical feature."""
    num_out: int = 0
    """Bags of all physical features."""


def find_starts(
    bags: Bags, tables: torch.Tensor, num_features: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each feature's ids start [F + 1] and each table's rows [T + 1], both int64.

    Args:
        bags: of the logical input.
        tables: int64 [T, TABLE_FIELDS].
        num_features: F.
    """
    new = functools.partial(torch.empty, dtype=torch.int64, device=bags.offsets.device)
    starts, out_starts = new(num_features + 1), new(len(tables) + 1)
    launch(
        _starts, (1,),
        bags.offsets, bags.offsets if bags.starts is None else bags.starts, tables, starts,
        out_starts, num_features, len(tables), bags.stride,
        FEATURES=triton.next_power_of_2(num_features + 1),
        TABLES=triton.next_power_of_2(len(tables)), TABLE_FIELDS=TABLE_FIELDS,
        VARIABLE=bags.starts is not None,
    )  # fmt: skip
    return starts, out_starts


def expand(
    *,
    ids: torch.Tensor,
    weights: torch.Tensor | None,
    starts: torch.Tensor,
    table_of: torch.Tensor,
    tables: torch.Tensor,
    chunks: torch.Tensor,
    out_starts: torch.Tensor,
    out: torch.Tensor,
    out_weights: torch.Tensor | None,
    invalid: torch.Tensor | None,
    first_bad: torch.Tensor | None,
    most_chunks: int,
    raw: bool,
    mark: bool,
) -> None:
    """Writes the rows of `ids` into `out`, and their weights into `out_weights`.

    Args:
        ids: int32 or int64 [V]; those out of bounds are read as 0.
        weights: [V], or None.
        starts: int64 [F + 1], where each feature's ids start; the last is their end, at most V.
        table_of: int64 [F], table of each feature.
        tables: int64 [T, TABLE_FIELDS].
        chunks: int64 [chunks of all tables, CHUNK_FIELDS].
        out_starts: int64 [T + 1], where each table's rows start in `out`.
        out: int64; per table [chunks, its ids, rows per id].
        out_weights: like `out`, of the type of `weights`, or None.
        invalid: int64 [T]; ids out of bounds are added per table. None: they are not counted.
        first_bad: int64 [T]; takes the lowest position in `ids` of one out of bounds, or None.
        most_chunks: of any table.
        raw: whether any table hashes raw ids.
        mark: whether any table marks seen ids.
    """
    if not len(ids):
        return
    counts = invalid if invalid is not None else starts
    launch(
        _expand, (triton.cdiv(len(ids), _VALUES),),
        ids, weights if weights is not None else ids, starts, table_of, tables, chunks,
        out_starts, out, out_weights if out_weights is not None else out, counts,
        first_bad if first_bad is not None else counts, len(ids), len(table_of),
        WEIGHTED=weights is not None, CHUNKS=most_chunks, STEPS=len(table_of).bit_length(),
        VALUES=_VALUES, RAW=raw, MARK=mark, COUNT=invalid is not None,
        FIRST_BAD=first_bad is not None, TABLE_FIELDS=TABLE_FIELDS, CHUNK_FIELDS=CHUNK_FIELDS,
        num_warps=_WARPS,
    )  # fmt: skip


def write_bags(
    *,
    bags: Bags,
    starts: torch.Tensor,
    features: torch.Tensor,
    tables: torch.Tensor,
    out_starts: torch.Tensor,
    lengths: torch.Tensor,
    offsets: torch.Tensor,
) -> None:
    """Writes the bags of rows: `lengths` [R] and `offsets`, int64 [R + 1].

    Args:
        bags: of the logical input.
        starts: int64 [F + 1], where each feature's ids start.
        features: int64 [P, FEATURE_FIELDS], of the physical features.
        tables: int64 [T, TABLE_FIELDS].
        out_starts: int64 [T + 1], where each table's rows start.
        lengths: of any integer type, in the order of the physical features, which is that of
            their rows.
        offsets: likewise.
    """
    starts_of_bags = bags.offsets if bags.starts is None else bags.starts
    launch(
        _bags, (triton.cdiv(len(lengths) + 1, _BAGS),),
        bags.offsets, starts_of_bags,
        starts_of_bags if bags.out_starts is None else bags.out_starts,
        starts, features, tables, out_starts, lengths, offsets,
        len(lengths), len(features), len(tables), bags.stride,
        BAGS=_BAGS, STEPS=len(features).bit_length(), FEATURE_FIELDS=FEATURE_FIELDS,
        TABLE_FIELDS=TABLE_FIELDS, VARIABLE=bags.starts is not None,
    )  # fmt: skip
