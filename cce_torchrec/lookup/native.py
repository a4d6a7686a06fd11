"""The compiled expansion (_native.cpp), where the package was installed with a C++ compiler.

It is optional: `available()` is False without it, and expansion.py then does the same in torch, and
FBGEMM what _backward.cpp does.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cce_torchrec import compiled
from cce_torchrec.codes.counts import chances
from cce_torchrec.codes.hashing import HashFunction

_FIELDS = 17
"""int64 of a `Job` in _native.cpp, the last two of which are its result."""
_FUNCTIONS = (
    "cce_expand_packed",
    "cce_count_bags",
    "cce_into_ranges",
    "cce_rowwise_adagrad",
    "cce_count_ids",
)
_LIBRARY = (Path(__file__).parent, _FUNCTIONS)
_CHANCES = torch.tensor(chances(), dtype=torch.int64, device="cpu")
_IDS = compiled.Pointer(torch.int32, torch.int64)
_INT64 = compiled.Pointer(torch.int64)
_BYTES = compiled.Pointer(torch.uint8)


@functools.cache
def kernels() -> ctypes.CDLL:
    """The compiled functions.

    Raises:
        RuntimeError: they were not built.
    """
    found = compiled.loaded(*_LIBRARY)
    # ctypes would hand integers and addresses over in 32 bits.
    pointer, integer, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
    table: list[Any] = [pointer, integer, pointer, real, real]
    batch: list[Any] = [compiled.Pointer(torch.float32), integer, integer, integer]
    found.cce_expand_packed.argtypes, found.cce_expand_packed.restype = [pointer, integer], integer
    bags: list[Any] = [_IDS, integer, pointer, integer, pointer]
    found.cce_count_bags.argtypes = bags
    found.cce_count_bags.restype = None
    ranges: list[Any] = [_IDS, integer, pointer, integer, _INT64]
    found.cce_into_ranges.argtypes, found.cce_into_ranges.restype = ranges, integer
    found.cce_rowwise_adagrad.argtypes = table + batch
    found.cce_rowwise_adagrad.restype = None
    counted: list[Any] = [_BYTES, _INT64, *[integer] * 5, _INT64, _BYTES]
    found.cce_count_ids.argtypes, found.cce_count_ids.restype = counted, None
    return found


@torch.compiler.assume_constant_result  # compiled models would trace the search for the library
def available() -> bool:
    """Whether the compiled expansion was built and loads."""
    return compiled.library(*_LIBRARY) is not None


def is_traced(tensor: torch.Tensor) -> bool:
    """Whether a graph is made of what is done, or `tensor` stands for one without data."""
    return torch.compiler.is_compiling() or type(tensor) is not torch.Tensor


def takes(ids: torch.Tensor) -> bool:
    """Whether the compiled expansion takes these ids."""
    return (
        ids.device.type == "cpu"
        and ids.dtype in (torch.int32, torch.int64)
        and ids.is_contiguous()
        and available()
    )


class Job(NamedTuple):
    """The ids of one table, and where their rows go."""

    ids: torch.Tensor
    """int32 or int64 [V], contiguous."""
    num_embeddings: int
    out: torch.Tensor
    """int64 with chunks * V * (2, or 1 without a helper) elements, contiguous."""
    chunks: torch.Tensor | None = None
    """int64 [chunks, 5]: column of `codes`, multiplier and addend of the main hash, and of the
    helper hash; None for a plain table, whose rows are its ids."""
    codes: torch.Tensor | None = None
    """Packed, or None where the code is a hash."""
    code_bits: int = 0
    num_rows: int = 0
    helper_rows: int = 0


def expand(jobs: Sequence[Job]) -> list[tuple[int, int]] | torch.Tensor:
    """Writes the rows of every job's ids, those outside [0, num_embeddings) as those of 0.

    Returns:
        Per job, how many ids are out of bounds and the position of the first; empty if none are.
        In a graph an int64 tensor [jobs, 2] of these.
    """
    # The operator is for graphs only: beside the 8 to 28 microseconds of one table, or the 110 to
    # 1,000 of 26, it costs 11 to 18, or 70 to 100.
    if not is_traced(jobs[0].ids):
        return _by_address(jobs)
    return _expand(*map(list, zip(*jobs, strict=True)))


def count_bags(lengths: torch.Tensor, sizes: Sequence[int]) -> list[int]:
    """What `bags.count_bags` gives, in one pass. There is at least one bag.

    Args:
        lengths: int32 or int64 [bags of all keys], contiguous.
        sizes: bags of each key, all of `lengths` together.
    """
    own = (ctypes.c_int64 * len(sizes))(*sizes)
    out = (ctypes.c_int64 * (len(sizes) + 2))()
    kernels().cce_count_bags(lengths, lengths.element_size(), own, len(sizes), out)
    return out[:]


def into_ranges(
    ids: torch.Tensor, features: Sequence[Sequence[int]], out: torch.Tensor
) -> list[tuple[int, int]]:
    """Writes the ids of each feature as its table counts them.

    Args:
        ids: int32 or int64 [V], contiguous; the features' one after the other.
        features: of each how many ids there are, the first one in the table, how many are its own,
            whether others are read as its 0, whether they are raw, and what they are hashed with.
        out: int64 [V].

    Returns:
        Per feature, how many ids are out of bounds and the position of the first among them; empty
        if none are.
    """
    fields = [number for feature in features for number in (*feature, 0, -1)]
    described = (ctypes.c_int64 * len(fields))(*fields)
    address = ctypes.addressof(described)
    if not kernels().cce_into_ranges(ids, ids.element_size(), address, len(features), out):
        return []
    size = len(fields) // len(features)
    return list(zip(described[size - 2 :: size], described[size - 1 :: size], strict=True))


def count_ids(counts: torch.Tensor, ids: torch.Tensor, own: range, hash_: HashFunction) -> None:
    """What `counts.count` does, with the bits of `hash_`.

    Args:
        counts: uint8, of the ids `own` of the table; written.
        ids: int64 [V], contiguous, counted from the first of these; others are read as it.
        own: the first is a multiple of 2.
        hash_: of the batch.
    """
    levels = torch.empty(len(ids), dtype=torch.uint8, device="cpu")
    numbers = len(ids), own.start, len(own), hash_.multiplier, hash_.addend
    kernels().cce_count_ids(counts, ids, *numbers, _CHANCES, levels)


def _by_address(jobs: Sequence[Job]) -> list[tuple[int, int]]:
    fields: list[int] = []
    for ids, num_embeddings, out, chunks, codes, code_bits, num_rows, helper_rows in jobs:
        fields += [_IDS.address(ids), ids.element_size(), ids.numel(), num_embeddings]
        fields += compiled.packed_codes(codes, code_bits)
        fields += [0, 0] if chunks is None else [_INT64.address(chunks), chunks.shape[0]]
        fields += [num_rows, helper_rows, _INT64.address(out), 0, -1]
    described = (ctypes.c_int64 * len(fields))(*fields)
    if not kernels().cce_expand_packed(ctypes.addressof(described), len(jobs)):
        return []
    return list(
        zip(described[_FIELDS - 2 :: _FIELDS], described[_FIELDS - 1 :: _FIELDS], strict=True)
    )


@compiled.operator(
    "expand(Tensor[] ids, SymInt[] num_embeddings, Tensor(a!)[] outs, Tensor?[] chunks, "
    "Tensor?[] codes, SymInt[] code_bits, SymInt[] num_rows, SymInt[] helper_rows) -> Tensor",
    fake=lambda ids, *rest: ids[0].new_empty((len(ids), 2), dtype=torch.int64),
)
def _expand(*fields: list[Any]) -> torch.Tensor:
    found = _by_address([Job(*job) for job in zip(*fields, strict=True)])
    # On the CPU, whatever a job has set as default device.
    return torch.tensor(found or [(0, -1)] * len(fields[0]), device="cpu")
