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

_FIELDS = 14
"""int64 of a `Job` in _native.cpp, the last two of which are its result."""
_LIBRARY = (Path(__file__).parent, ("cce_expand", "cce_rowwise_adagrad"))


@functools.cache
def kernels() -> ctypes.CDLL:
    """The compiled functions.

    Raises:
        RuntimeError: they were not built.
    """
    found = compiled.loaded(*_LIBRARY)
    pointer, integer, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
    table: list[Any] = [pointer, integer, pointer, real, real]
    batch: list[Any] = [pointer, integer, integer, integer]
    found.cce_expand.argtypes, found.cce_expand.restype = [pointer, integer], integer
    found.cce_rowwise_adagrad.argtypes = table + batch
    found.cce_rowwise_adagrad.restype = None
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
    """[N, c] in storage type, contiguous, or None where the code is a hash."""
    num_rows: int = 0
    helper_rows: int = 0


def expand(jobs: Sequence[Job]) -> list[tuple[int, int]]:
    """Writes the rows of every job's ids, those outside [0, num_embeddings) as those of 0.

    Returns:
        Per job, how many ids are out of bounds and the position of the first; empty if none are.
    """
    fields: list[int] = []
    for ids, num_embeddings, out, chunks, codes, num_rows, helper_rows in jobs:
        fields += [ids.data_ptr(), ids.element_size(), ids.numel(), num_embeddings]
        if codes is None:
            fields += [0, 0, 0]
        else:
            assert codes.is_contiguous()
            fields += [codes.data_ptr(), codes.element_size(), codes.shape[1]]
        fields += [0, 0] if chunks is None else [chunks.data_ptr(), chunks.shape[0]]
        fields += [num_rows, helper_rows, out.data_ptr(), 0, -1]
    described = (ctypes.c_int64 * len(fields))(*fields)
    if not kernels().cce_expand(ctypes.addressof(described), len(jobs)):
        return []
    return list(
        zip(described[_FIELDS - 2 :: _FIELDS], described[_FIELDS - 1 :: _FIELDS], strict=True)
    )


def expand_in_graph(jobs: Sequence[Job]) -> torch.Tensor:
    """The same as an operator, which a graph can have; int64 [jobs, 2], also if none are."""
    # Only for graphs: a call takes 8 to 28 microseconds for one table and 110 to 1,000 for 26 by
    # `expand`, and by the operator 11 to 18 and 70 to 100 more.
    ids, num_embeddings, outs, chunks, codes, num_rows, helper_rows = map(
        list, zip(*jobs, strict=True)
    )
    return _expand(ids, num_embeddings, chunks, codes, num_rows, helper_rows, outs)


@compiled.operator(
    "expand(Tensor[] ids, SymInt[] num_embeddings, Tensor?[] chunks, Tensor?[] codes, "
    "SymInt[] num_rows, SymInt[] helper_rows, Tensor(a!)[] outs) -> Tensor",
    fake=lambda ids, *rest: ids[0].new_empty((len(ids), 2), dtype=torch.int64),
)
def _expand(ids: list[torch.Tensor], num_embeddings: list[int], *rest: Any) -> torch.Tensor:
    chunks, codes, num_rows, helper_rows, outs = rest
    jobs = zip(ids, num_embeddings, outs, chunks, codes, num_rows, helper_rows, strict=True)
    found = expand([Job(*job) for job in jobs])
    return torch.tensor(found or [(0, -1)] * len(ids))
