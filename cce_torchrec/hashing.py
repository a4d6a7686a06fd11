"""Seeded multiply-shift hash of ids to rows; pure functions whose values are a checkpoint format.

`h(x) = (((a * x + b) mod 2^64) >> 33) * n >> 31` with odd 64-bit a and any b (Dietzfelbinger
et al., "A reliable randomized algorithm for the closest-pair problem", 1997). The arithmetic is
int64 with wrap-around, so that CPU, GPU and every rank agree. Golden values are pinned in
tests/unit/test_hashing.py.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch

_MASK = 2**64 - 1
CODE_ROLE = 0
HELPER_ROLE = 1
SAMPLE_ROLE = 2
RAW_ID_ROLE = 3


def _splitmix64(state: int) -> int:
    """One output of SplitMix64 (Steele et al., OOPSLA 2014) for the given state."""
    z = (state + 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


@dataclass(frozen=True)
class HashFunction:
    """One member of the family: `multiplier` (odd) and `addend`, both signed 64-bit."""

    multiplier: int
    addend: int

    def __call__(self, ids: torch.Tensor, num_rows: int) -> torch.Tensor:
        """Rows in [0, num_rows) of `ids` (any shape and integer type), int64."""
        return (self.bits31(ids) * num_rows) >> 31

    def bits31(self, ids: torch.Tensor) -> torch.Tensor:
        """31 hashed bits per id, int64."""
        return ((ids.long() * self.multiplier + self.addend) >> 33) & 0x7FFFFFFF


def hash_rows(
    ids: torch.Tensor, multipliers: torch.Tensor, addends: torch.Tensor, num_rows: int
) -> torch.Tensor:
    """Rows in [0, num_rows) of `ids` [V] under several functions [F, 1], int64 [F, V]."""
    bits = (ids.long() * multipliers).add_(addends).bitwise_right_shift_(33)
    return bits.bitwise_and_(0x7FFFFFFF).mul_(num_rows).bitwise_right_shift_(31)


def hash_function(seed: int, table: str, chunk: int, role: int, round_: int = 0) -> HashFunction:
    """The hash of one chunk of one table; `round_` counts the clusterings of the table."""
    state = _splitmix64((seed & _MASK) ^ zlib.crc32(table.encode()))
    for part in (chunk, role, round_):
        state = _splitmix64(state ^ part)
    addend = _splitmix64(state ^ 0xADD)
    return HashFunction(_signed(_splitmix64(state) | 1), _signed(addend))


def helper_hash(seed: int, table: str, chunk: int, clusterings: int) -> HashFunction:
    """Hash that sends an id to its helper row after `clusterings` clusterings."""
    return hash_function(seed, table, chunk, HELPER_ROLE, clusterings)


def code_hash(seed: int, table: str, chunk: int) -> HashFunction:
    """Hash that is an id's code until the first clustering."""
    return hash_function(seed, table, chunk, CODE_ROLE)


def hash_ids(ids: torch.Tensor, seed: int, table: str, num_embeddings: int) -> torch.Tensor:
    """Ids in [0, num_embeddings) of raw `ids`: any integers, negative ones included; int64.

    SplitMix64's mixing of each id, xored with a seed, then the remainder of its upper 63 bits. The
    mixing is a bijection, so raw ids meet only in the remainder; unlike multiply-shift it leaves
    no structure of raw ids (time stamps, packed fields) in the rows.
    """
    key = hash_function(seed, table, 0, RAW_ID_ROLE).addend
    z = ids.long() ^ key
    for shift, multiplier in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ _shifted(z, shift)) * _signed(multiplier)
    return _shifted(z ^ _shifted(z, 31), 1) % num_embeddings


def _shifted(values: torch.Tensor, by: int) -> torch.Tensor:
    """int64 shifted right as unsigned."""
    return (values >> by) & ((1 << (64 - by)) - 1)
