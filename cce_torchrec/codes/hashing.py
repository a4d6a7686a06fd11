"""Seeded hash of ids to rows; pure functions whose values are a checkpoint format.

`h(x) = (((a * mix(x) + b) mod 2^64) >> 33) * n >> 31` with odd 64-bit a and any b: multiply-shift
(Dietzfelbinger et al., "A reliable randomized algorithm for the closest-pair problem", 1997) of the
id mixed as SplitMix64 mixes its state (Steele et al., OOPSLA 2014). The mix is a bijection and the
same for all tables, so it is made once per id. Without it consecutive ids would lie on a lattice:
more even over rows than random ones, and often in few of the pairs of code and helper row.

The arithmetic is int64 with wrap-around, so that CPU, GPU and every rank agree. hashing.h and
gpu/triton_functions.py hold the same in C++ and Triton; values are pinned in
tests/unit/test_hashing.py.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

_MASK = 2**64 - 1
_ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_LAST_SHIFT = 31
_GAMMA = 0x9E3779B97F4A7C15
_ADDEND = 0xADD
"""Parts the two numbers of a hash function."""
CODE_ROLE = 0
HELPER_ROLE = 1
SAMPLE_ROLE = 2
RAW_ID_ROLE = 3
COUNT_ROLE = 4
IMPORT_ROLE = 5


def _splitmix64(state: int) -> int:
    """One output of SplitMix64 for the given state."""
    z = (state + _GAMMA) & _MASK
    for shift, multiplier in _ROUNDS:
        z = ((z ^ (z >> shift)) * multiplier) & _MASK
    return z ^ (z >> _LAST_SHIFT)


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def mix(ids: torch.Tensor) -> torch.Tensor:
    """SplitMix64's mixing of `ids` (any shape and integer type): a bijection of 64 bits, int64."""
    z = ids.long()
    for shift, multiplier in _ROUNDS:
        z = (z ^ _shifted(z, shift)).mul_(_signed(multiplier))
    return z ^ _shifted(z, _LAST_SHIFT)


def _shifted(values: torch.Tensor, by: int) -> torch.Tensor:
    """int64 shifted right as unsigned."""
    # torch's shift repeats the sign bit.
    return (values >> by).bitwise_and_((1 << (64 - by)) - 1)


@dataclass(frozen=True)
class HashFunction:
    """One member of the family: `multiplier` (odd) and `addend`, both signed 64-bit."""

    multiplier: int
    addend: int

    def __call__(self, ids: torch.Tensor, num_rows: int) -> torch.Tensor:
        """Rows in [0, num_rows) of `ids` (any shape and integer type), int64."""
        return self.of_mixed(mix(ids), num_rows)

    def of_mixed(self, mixed: torch.Tensor, num_rows: int) -> torch.Tensor:
        """Rows of ids that `mix` has mixed."""
        return (self._bits31(mixed) * num_rows) >> 31

    def bits31(self, ids: torch.Tensor) -> torch.Tensor:
        """31 hashed bits per id, int64."""
        return self._bits31(mix(ids))

    def _bits31(self, mixed: torch.Tensor) -> torch.Tensor:
        return ((mixed * self.multiplier + self.addend) >> 33) & 0x7FFFFFFF


def hash_rows(
    ids: torch.Tensor, multipliers: torch.Tensor, addends: torch.Tensor, num_rows: int
) -> torch.Tensor:
    """Rows in [0, num_rows) of `ids` [V] under several functions [F, 1], int64 [F, V]."""
    bits = (mix(ids) * multipliers).add_(addends).bitwise_right_shift_(33)
    return bits.bitwise_and_(0x7FFFFFFF).mul_(num_rows).bitwise_right_shift_(31)


@torch.compiler.assume_constant_result  # a graph would end at zlib, which cannot be traced
def _name_bits(table: str) -> int:
    # Not `hash` of the name, which differs from process to process.
    return zlib.crc32(table.encode())


def hash_function(seed: int, table: str, chunk: int, *, role: int, round_: int = 0) -> HashFunction:
    """The hash of one chunk of one table; `round_` counts the clusterings of the table."""
    state = _splitmix64(_state(seed, table, chunk, role) ^ round_)
    addend = _splitmix64(state ^ _ADDEND)
    # Multiply-shift takes odd multipliers.
    return HashFunction(_signed(_splitmix64(state) | 1), _signed(addend))


def _state(seed: int, table: str, chunk: int, role: int) -> int:
    """What all rounds of a hash function start from."""
    state = _splitmix64((seed & _MASK) ^ _name_bits(table))
    for part in (chunk, role):
        state = _splitmix64(state ^ part)
    return state


def helper_hash(seed: int, table: str, chunk: int, clusterings: int) -> HashFunction:
    """Hash that sends an id to its helper row after `clusterings` clusterings."""
    return hash_function(seed, table, chunk, role=HELPER_ROLE, round_=clusterings)


def helper_hashes(
    seed: int, table: str, chunks: Sequence[int], clusterings: torch.Tensor
) -> torch.Tensor:
    """Multiplier and addend of `helper_hash` for each of `chunks`, int64 [chunks, 2].

    On the device of `clusterings`, an int64 scalar whose value nothing waits for.
    """
    states = [_signed(_state(seed, table, chunk, HELPER_ROLE)) for chunk in chunks]
    return _in_round(states, clusterings)


def bits_of_batch(ids: torch.Tensor, seed: int, table: str, batch: torch.Tensor) -> torch.Tensor:
    """31 hashed bits of `ids` [V] of a table, others for each `batch`, int64 [V].

    `batch` is an int64 scalar, whose value nothing waits for.
    """
    hashes = _in_round([count_state(seed, table)], batch)
    return hash_rows(ids, hashes[:, :1], hashes[:, 1:], 1 << 31).view(-1)


def hash_of_batch(seed: int, table: str, batch: int) -> HashFunction:
    """The function whose 31 bits `bits_of_batch` gives."""
    return hash_function(seed, table, 0, role=COUNT_ROLE, round_=batch)


def count_state(seed: int, table: str) -> int:
    """What the hashes of all batches of a table start from, as signed 64-bit."""
    return _signed(_state(seed, table, 0, COUNT_ROLE))


def _in_round(starts: list[int], round_: torch.Tensor) -> torch.Tensor:
    """Multiplier and addend of the functions that start from signed `starts`, int64 [starts, 2]."""
    # No new tensor of `starts`, as TorchScript has none on a device that a graph knows later.
    states = torch.stack([round_ ^ start for start in starts])
    states = mix(states + _signed(_GAMMA))
    multipliers = mix(states + _signed(_GAMMA)) | 1
    addends = mix((states ^ _ADDEND) + _signed(_GAMMA))
    return torch.stack([multipliers, addends], dim=1)


def code_hash(seed: int, table: str, chunk: int) -> HashFunction:
    """Hash that is an id's code until the first clustering."""
    return hash_function(seed, table, chunk, role=CODE_ROLE)


def hash_ids(
    ids: torch.Tensor, key: int | torch.Tensor, num_embeddings: int | torch.Tensor
) -> torch.Tensor:
    """Ids in [0, num_embeddings) of raw `ids`: any integers, negative ones included; int64.

    Args:
        ids: any shape.
        key: `raw_id_key` of the table, or of each id.
        num_embeddings: of the table, or of each id.
    """
    # Xor and mix are bijections, so that raw ids meet only in the remainder of the upper 63 bits.
    return _shifted(mix(ids.long() ^ key), 1) % num_embeddings


def raw_id_key(seed: int, table: str) -> int:
    """The signed 64-bit seed that raw ids of a table are xored with."""
    return hash_function(seed, table, 0, role=RAW_ID_ROLE).addend
