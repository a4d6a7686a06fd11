"""The lookup of packed tables in Triton: all tables and features of a batch in one launch.

It compiles on CUDA, and under TRITON_INTERPRET=1 runs on the CPU, where tests compare it with the
compiled operator (_lookup.cpp), whose order of additions is its own.

A feature's output is cut into pieces of VEC columns, of a bag and of a chunk each. A program has
SLOTS of them, neighbours in the output: so it writes whole lines, however wide its table is, and
what several pieces read of an id (its number, its codes, the scale of a row) is one read of a warp.
Each slot goes through the ids of its bag one after the other and adds up what they read, so that
sums come out the same in every run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from cce_torchrec.gpu.launch import launch
from cce_torchrec.gpu.triton_functions import code_at, hashed, hashed_raw, mix

FIELDS = 20
"""int64 per feature, see `lookup.numbers_of`: 0 its ids, 1 the first of them, 2 the key that raw
ids are hashed with, 3 whether they are; 4 byte where codes begin, 5 bits of a code (0: none are
stored), 6 main rows, 7 helper rows, 8 reads of a chunk, 9 whether main rows are hashes, 10 mask of
a code; 11 byte where rows begin, 12 bytes of a row, 13 type, 14 width of a chunk, 15 chunks; 16
whether the mean is taken, 17 its input, 18 its first column, 19 the chunk that it begins with."""
FP16, INT8, INT4 = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
"""FBGEMM's numbers of row types (row_types.py); that of float32 is 0."""
NONE_FOUND = torch.iinfo(torch.int64).max
"""In place of the first of what is wrong, where nothing is."""
_MOST = {0: 4, 1: 8, 2: 4, 3: 8}
"""Values of a row that a slot has at most, by type: those that one load of a thread may have, of 16
bytes, and behind the 4 bytes of scale and bias of 4."""
_SLOTS, _WARPS = 128, 4
"""Slots of a program and its warps, a slot for each thread: two take 1.5 times the registers. No
others were measured."""


@triton.jit
def _values(rows_ptr, row, within, on, TYPE: tl.constexpr, VEC: tl.constexpr):  # type: ignore[no-untyped-def]
    # VEC values from the column `within` on of rows that begin at the byte `row`: float32.
    lane, on = tl.arange(0, VEC)[None, :], on[:, None]
    if TYPE == INT8:
        at = (rows_ptr + (row + (4 + within)))[:, None]
        return tl.load(at + lane, mask=on, other=0).to(tl.float32)
    elif TYPE == INT4:
        at = (rows_ptr + (row + (4 + within // 2)))[:, None]
        pairs = tl.load(at + tl.arange(0, VEC // 2)[None, :], mask=on, other=0)
        both = tl.join(pairs & 15, pairs >> 4)
        return tl.reshape(both, (row.shape[0], VEC)).to(tl.float32)
    elif TYPE == FP16:
        at = (rows_ptr + (row + within * 2)).to(tl.pointer_type(tl.float16))[:, None]
        return tl.load(at + lane, mask=on, other=0).to(tl.float32)
    else:
        at = (rows_ptr + (row + within * 4)).to(tl.pointer_type(tl.float32))[:, None]
        return tl.load(at + lane, mask=on, other=0)


@triton.jit
def _header(rows_ptr, row, on, TYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    # Scale and bias of the rows, which others than of integers have not.
    if TYPE >= INT8:
        at = (rows_ptr + row).to(tl.pointer_type(tl.float16))[:, None] + tl.arange(0, 2)[None, :]
        scale, bias = tl.split(tl.load(at, mask=on[:, None], other=0).to(tl.float32))
    else:
        scale = tl.full(row.shape, 1, tl.float32)
        bias = tl.zeros(row.shape, tl.float32)
    return scale, bias


@triton.jit
def _added(sums, values, scale, bias, weights, TYPE: tl.constexpr, WEIGHTED: tl.constexpr):  # type: ignore[no-untyped-def]
    # As the compiled operator adds: the bias, rounded, and then a product that is not.
    if WEIGHTED:
        scale, bias = scale * weights, bias * weights
    if TYPE >= INT8:
        sums += bias[:, None]
    if WEIGHTED or TYPE >= INT8:
        return tl.fma(values, scale[:, None] + tl.zeros(sums.shape, tl.float32), sums)
    else:
        return sums + values


@triton.jit
def _tell_bags(found_ptr, at, length, end, last, num_values, on):  # type: ignore[no-untyped-def]
    # The first bag whose length is negative or more than what is left; beyond all bags stands for
    # values that belong to none. Bags after a wrong one may seem right or wrong, and do not matter.
    left = num_values - (end - length)
    wrong = on & ((length < 0) | (length > left))
    rest = on & (at == last - 1) & (end != num_values)
    place = tl.where(wrong, at, last)
    tl.atomic_min(found_ptr + tl.zeros(at.shape, tl.int64), place, mask=wrong | rest, sem="relaxed")


@triton.jit
def _main_rows(  # type: ignore[no-untyped-def]
    ids, mixed, multiplier, addend, codes_ptr, first_bit, id_bits, bits, num_rows, is_hashed, on
):  # fmt: skip
    row = ids  # of a plain table
    # All slots of a program are of one table: these are no branches within a warp.
    if bits > 0:
        row = code_at(codes_ptr, first_bit + ids * id_bits, bits, on)
    if is_hashed != 0:
        row = hashed(mixed, multiplier, addend, num_rows)
    return row


@triton.jit(
    do_not_specialize=["num_values", "num_lengths", "num_bags", "total_dim", "most_chunks"],
    do_not_specialize_on_alignment=[
        "values_ptr", "lengths_ptr", "ends_ptr", "weights_ptr", "found_ptr",
    ],
)  # fmt: skip
def look_up(  # type: ignore[no-untyped-def]
    values_ptr, lengths_ptr, ends_ptr, weights_ptr, codes_ptr, rows_ptr, numbers_ptr, hashes_ptr,
    out_ptr, found_ptr, num_values, num_lengths, num_bags, total_dim, most_chunks,
    TYPE: tl.constexpr, VEC: tl.constexpr, SLOTS: tl.constexpr, HASHED: tl.constexpr,
    HELPED: tl.constexpr, ALIGNED: tl.constexpr, FIELDS: tl.constexpr, NONE: tl.constexpr,
):  # fmt: skip
    """SLOTS pieces of the output of the feature `program_id(1)`; see `pooled`."""
    feature = tl.program_id(1)
    field = numbers_ptr + feature * FIELDS
    own, first_id = tl.load(field), tl.load(field + 1)
    key, is_raw = tl.load(field + 2), tl.load(field + 3)
    bits = tl.load(field + 5)
    num_rows, helper_rows = tl.load(field + 6), tl.load(field + 7)
    is_hashed, row_bytes = tl.load(field + 9), tl.load(field + 12)
    width, num_chunks = tl.load(field + 14).to(tl.int32), tl.load(field + 15).to(tl.int32)

    # Slots are counted from the first bag of the program on: int32, which are divided fast.
    per_bag = width * num_chunks // VEC
    first = tl.program_id(0).to(tl.int64) * SLOTS
    first_bag = first // per_bag
    if first_bag >= num_bags:  # of a table that is narrower than others
        return
    slot = (first - first_bag * per_bag).to(tl.int32) + tl.arange(0, SLOTS)
    bag = first_bag + slot // per_bag
    column = (slot % per_bag) * VEC
    place = column // width
    within = tl.multiple_of(column - place * width, VEC)
    chunk = place + tl.load(field + 19).to(tl.int32)
    chunk = tl.where(chunk < num_chunks, chunk, chunk - num_chunks)
    on = bag < num_bags

    at = tl.load(field + 17) * num_bags + bag
    length = tl.load(lengths_ptr + at, mask=on, other=0).to(tl.int64)
    end = tl.load(ends_ptr + at, mask=on, other=0)
    if found_ptr is not None:
        _tell_bags(found_ptr, at, length, end, num_lengths, num_values, on & (column == 0))
    # Whatever lengths say, no other memory is read.
    begin = tl.minimum(tl.maximum(end - length, 0), num_values)
    count = tl.minimum(tl.maximum(end, begin), num_values) - begin

    # What ids of a slot share: where codes and rows of its chunk begin, and how they are hashed.
    first_bit = tl.load(field + 4) * 8 + chunk * bits
    chunk_bytes = (num_rows + helper_rows) * row_bytes
    main = tl.load(field + 11) + chunk.to(tl.int64) * chunk_bytes
    helper = main + num_rows * row_bytes
    hashes = hashes_ptr + feature * 4 * most_chunks + chunk
    zeros = tl.zeros(at.shape, tl.int64)  # makes one number for all slots one for each
    multiplier, addend = zeros, zeros
    if HASHED:
        multiplier, addend = tl.load(hashes), tl.load(hashes + most_chunks)
    if HELPED:
        hashes += 2 * most_chunks
        helper_multiplier, helper_addend = tl.load(hashes), tl.load(hashes + most_chunks)

    sums = tl.zeros((SLOTS, VEC), tl.float32)
    first_bad = tl.full(at.shape, NONE, tl.int64)
    weights = tl.zeros(at.shape, tl.float32)
    for i in range(tl.max(count, axis=0)):
        here = on & (i < count)
        ids = tl.load(values_ptr + begin + i, mask=here, other=0).to(tl.int64)
        if weights_ptr is not None:
            weights = tl.load(weights_ptr + begin + i, mask=here, other=0)
        if is_raw != 0:
            ids = hashed_raw(ids, key, tl.maximum(own, 1))
        bad = (ids < 0) | (ids >= own)
        if found_ptr is not None:
            first_bad = tl.where(here & bad, tl.minimum(first_bad, begin + i), first_bad)
        ids = tl.where(bad, 0, ids) + first_id
        mixed = ids
        if HASHED or HELPED:
            mixed = mix(ids)
        row = _main_rows(ids, mixed, multiplier, addend, codes_ptr, first_bit, num_chunks * bits,
                         bits, num_rows, is_hashed, here)  # fmt: skip
        row = tl.multiple_of(main + row * row_bytes, ALIGNED)
        scale, bias = _header(rows_ptr, row, here, TYPE)
        values = _values(rows_ptr, row, within, here, TYPE, VEC)
        if HELPED:  # read before the first row is waited for
            two = here & (helper_rows + zeros > 0)
            row = hashed(mixed, helper_multiplier, helper_addend, helper_rows)
            row = tl.multiple_of(helper + row * row_bytes, ALIGNED)
            helper_scale, helper_bias = _header(rows_ptr, row, two, TYPE)
            helper_values = _values(rows_ptr, row, within, two, TYPE, VEC)
        sums = _added(sums, values, scale, bias, weights, TYPE, weights_ptr is not None)
        if HELPED:
            # Without a helper its values are 0, which an infinite weight would make none.
            sums = _added(sums, helper_values, helper_scale, helper_bias,
                          tl.where(two, weights, 0), TYPE, weights_ptr is not None)  # fmt: skip

    if tl.load(field + 16) != 0:
        size = tl.maximum(count, 1).to(tl.float32)
        sums = tl.div_rn(sums, size[:, None] + tl.zeros(sums.shape, tl.float32))
    if found_ptr is not None:
        # Of all features, in the order of the output: the feature, and the place among the values.
        place = feature.to(tl.int64) * num_values + first_bad
        tl.atomic_min(found_ptr + 1 + zeros, place, mask=first_bad != NONE, sem="relaxed")
    to = bag * total_dim + tl.multiple_of(tl.load(field + 18) + column, VEC)
    to = tl.multiple_of(to, VEC)
    tl.store(out_ptr + to[:, None] + tl.arange(0, VEC)[None, :], sums, mask=on[:, None])


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What the kernel is compiled for, of the tables of a lookup (by their `numbers_of`)."""

    row_type: int
    vec: int
    """Values of a row that a slot has."""
    aligned: int
    """Divides the byte with which any row begins."""
    per_bag: int
    """Slots of a bag of the widest table."""
    hashed: bool
    helped: bool

    @classmethod
    def of(cls, numbers: list[list[int]]) -> Shape:
        """That of features, each given by its numbers.

        Raises:
            ValueError: their tables have rows of several types.
        """
        types = {own[13] for own in numbers}
        if len(types) > 1:
            raise ValueError("lookup 'triton' takes tables whose rows are all of one type")
        (row_type,) = types
        # Powers of two that divide every width, and every place of a row.
        vec = math.gcd(_MOST[row_type], *(own[14] for own in numbers))
        aligned = math.gcd(16, *(own[11] for own in numbers), *(own[12] for own in numbers))
        return cls(
            row_type=row_type,
            vec=vec,
            aligned=aligned,
            per_bag=max(own[14] * own[15] for own in numbers) // vec,
            hashed=any(own[9] for own in numbers),
            helped=any(own[7] for own in numbers),
        )


def pooled(
    shape: Shape,
    values: torch.Tensor,
    lengths: torch.Tensor,
    weights: torch.Tensor | None,
    *,
    codes: torch.Tensor,
    rows: torch.Tensor,
    numbers: torch.Tensor,
    hashes: torch.Tensor,
    out: torch.Tensor,
    found: torch.Tensor | None,
) -> None:
    """Writes the embeddings of all bags into `out`, and never waits for the device.

    Args:
        shape: of the tables.
        values: ids [V], int32 or int64; those out of bounds are read as id 0.
        lengths: [inputs * B], int32 or int64, of which none reads beyond the values.
        weights: float32 [V], or None.
        codes: int32 [words], of all tables.
        rows: uint8 [bytes], of all tables.
        numbers: int64 [features, FIELDS].
        hashes: int64 [features, 4, most chunks].
        out: float32 [B, sum of D].
        found: int64 [2] of NONE_FOUND, or None: takes the first length that is wrong, or the
            number of lengths if they add up to less than V; and the first id out of bounds, as
            feature * V + its place.
    """
    num_bags, total_dim = out.shape
    ends = lengths.cumsum(0)  # int64, whatever lengths are
    launch(
        look_up, (-(-num_bags * shape.per_bag // _SLOTS), len(numbers)),
        values, lengths, ends, weights, codes, rows, numbers, hashes, out, found,
        values.numel(), lengths.numel(), num_bags, total_dim, hashes.shape[2],
        TYPE=shape.row_type, VEC=shape.vec, SLOTS=_SLOTS, HASHED=shape.hashed,
        HELPED=shape.helped, ALIGNED=shape.aligned, FIELDS=FIELDS, NONE=NONE_FOUND,
        num_warps=_WARPS,
        enable_fp_fusion=False,  # sums are rounded where the compiled operator rounds them
    )  # fmt: skip
