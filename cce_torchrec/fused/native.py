"""The compiled expansion (_native.cpp), where the package was installed with a C++ compiler.

It is optional: `available()` is False without it, and expand.py then does the same in torch.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch

_POINTER, _INT = ctypes.c_void_p, ctypes.c_int64
_EXPAND: list[Any] = [_POINTER, _INT, _INT, _INT, _POINTER, _INT, _INT, _POINTER, _INT, _INT, _INT]


@functools.cache
def _library() -> ctypes.CDLL | None:
    for file in sorted(Path(__file__).parent.glob("_native*.so")):
        try:
            library = ctypes.CDLL(str(file))
        except OSError:  # built for another platform
            continue
        library.cce_expand.argtypes = [*_EXPAND, _POINTER, _POINTER]
        library.cce_check_ids.argtypes = [_POINTER, _INT, _INT, _INT, _POINTER, _POINTER]
        library.cce_expand.restype = library.cce_check_ids.restype = _INT
        return library
    return None


def available() -> bool:
    """Whether the compiled expansion was built and loads."""
    return _library() is not None


def takes(ids: torch.Tensor) -> bool:
    """Whether the compiled expansion takes these ids."""
    return (
        ids.device.type == "cpu"
        and ids.dtype in (torch.int32, torch.int64)
        and ids.is_contiguous()
        and available()
    )


def expand(
    ids: torch.Tensor,
    num_embeddings: int,
    codes: torch.Tensor | None,
    chunks: torch.Tensor,
    num_rows: int,
    helper_rows: int,
    out: torch.Tensor,
) -> tuple[int, int]:
    """Writes the rows of `ids` into `out`; ids outside [0, num_embeddings) are read as 0.

    Args:
        ids: int32 or int64 [V], contiguous.
        num_embeddings: ids of the table.
        codes: [N, c] in storage type, or None where the code is a hash.
        chunks: int64 [chunks, 5]: column of `codes`, multiplier and addend of the main hash, and
            of the helper hash.
        num_rows: rows of the main codebook.
        helper_rows: rows of the helper codebook, 0 without one.
        out: int64 with chunks * V * (2, or 1 without a helper) elements, contiguous.

    Returns:
        How many ids are out of bounds, and the position of the first (-1 without any).
    """
    library, bad = _library(), ctypes.c_int64(-1)
    assert library is not None
    pointer, width, stride = (
        (codes.data_ptr(), codes.element_size(), codes.stride(0))
        if codes is not None
        else (0, 4, 0)
    )
    count = library.cce_expand(
        *(ids.data_ptr(), ids.element_size(), ids.numel(), num_embeddings),
        *(pointer, width, stride, chunks.data_ptr(), len(chunks), num_rows, helper_rows),
        *(out.data_ptr(), ctypes.addressof(bad)),
    )
    return count, bad.value


def check_ids(ids: torch.Tensor, num_embeddings: int, out: torch.Tensor) -> tuple[int, int]:
    """Copies `ids` to `out` (int64), those out of bounds as 0; arguments and result of `expand`."""
    library, bad = _library(), ctypes.c_int64(-1)
    assert library is not None
    count = library.cce_check_ids(
        *(ids.data_ptr(), ids.element_size(), ids.numel(), num_embeddings),
        *(out.data_ptr(), ctypes.addressof(bad)),
    )
    return count, bad.value
