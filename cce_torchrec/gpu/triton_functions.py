"""Hashes and codes as Triton's kernels read them: those of the folder codes once more."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def mix(ids):  # type: ignore[no-untyped-def]  # Triton's own types
    """hashing.mix of int64."""
    z = ids  # int64, whose right shifts are masked to be those of unsigned numbers
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return z ^ ((z >> 31) & 0x1FFFFFFFF)


@triton.jit
def bits31(mixed, multiplier, addend):  # type: ignore[no-untyped-def]
    """HashFunction.bits31 of mixed ids."""
    return ((mixed * multiplier + addend) >> 33) & 0x7FFFFFFF


@triton.jit
def hashed(mixed, multiplier, addend, rows):  # type: ignore[no-untyped-def]
    """HashFunction.of_mixed, of fewer than 2^31 rows."""
    # Of 31 bits times rows the bits from 31 on: of twice as much the upper 32, one instruction.
    twice = ((mixed * multiplier + addend) >> 32) & 0xFFFFFFFE
    return tl.umulhi(twice.to(tl.uint32), rows.to(tl.uint32)).to(tl.int64)


@triton.jit
def hashed_raw(ids, key, num_embeddings):  # type: ignore[no-untyped-def]
    """hashing.hash_ids: the remainder of the upper 63 bits of the id's mix with the key."""
    return ((mix(ids ^ key) >> 1) & 0x7FFFFFFFFFFFFFFF) % num_embeddings


@triton.jit
def code_at(address, bit, bits, on):  # type: ignore[no-untyped-def]
    """The codes of `bits` bits (1 to 32) from `bit` of packed codes at `address` on, int64."""
    # By whole words of 32 bits, in which packed codes lie; most codes are in one of them.
    word, low = address.to(tl.pointer_type(tl.int32)) + (bit >> 5), bit & 31
    found = tl.load(word, mask=on, other=0).to(tl.int64) & 0xFFFFFFFF
    rest = tl.load(word + 1, mask=on & (low + bits > 32), other=0).to(tl.int64)
    return ((found | (rest << 32)) >> low) & ((tl.full(bit.shape, 1, tl.int64) << bits) - 1)


@triton.jit
def row_at(address, row, on, ROW_BYTES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows of packed codes at `address`, of ROW_BYTES bytes: all codes of an id at once, int64."""
    if ROW_BYTES == 1:
        return tl.load(address.to(tl.pointer_type(tl.uint8)) + row, mask=on, other=0).to(tl.int64)
    elif ROW_BYTES == 2:
        return tl.load(address.to(tl.pointer_type(tl.int16)) + row, mask=on, other=0).to(tl.int64)
    elif ROW_BYTES == 4:
        return tl.load(address.to(tl.pointer_type(tl.int32)) + row, mask=on, other=0).to(tl.int64)
    else:
        return tl.load(address.to(tl.pointer_type(tl.int64)) + row, mask=on, other=0)


@triton.jit
def mark_bits(address, ids, on):  # type: ignore[no-untyped-def]
    """Sets the bits of `ids` in the words of 32 from `address` on."""
    # Most bits of popular ids are set already: looking first spares most of the atomics.
    word = address.to(tl.pointer_type(tl.int32)) + (ids >> 5)
    bit = (tl.full(ids.shape, 1, tl.int32) << (ids & 31).to(tl.int32)).to(tl.int32)
    held = tl.load(word, mask=on, other=-1)
    tl.atomic_or(word, bit, mask=on & ((held & bit) == 0))


@triton.jit
def last_at(starts_ptr, step, at, count, STEPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The last of `count` rising starts at or before each of `at`; empty ones are passed."""
    found = tl.zeros(at.shape, tl.int32)
    end = tl.zeros(at.shape, tl.int32) + count
    for _ in range(STEPS):
        middle = (found + end) // 2
        before = tl.load(starts_ptr + middle.to(tl.int64) * step) <= at
        found = tl.where(before, middle, found)
        end = tl.where(before, end, middle)
    return found
