"""The one loader of compiled kernels: C functions, by ctypes, where a compiler built them.

Not an extension of torch or Python: building needs neither, and one library serves all versions of
them. To torch they are operators all the same, in the namespace `cce_torchrec`, registered from
Python. There is a library for each level of CPU instructions (cpu_level.py).

Tensors go to them by address, which says nothing of what is there: `Pointer` is the one place where
an address is taken, once type, device and strides are seen to be what the kernel was written for.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cce_torchrec.cpu_level import LEVELS, levels_below
from cce_torchrec.packing import CodePacking

_CPU = torch.device("cpu")
_OPERATORS = torch.library.Library("cce_torchrec", "DEF")


@functools.cache
def library(folder: Path, functions: tuple[str, ...]) -> ctypes.CDLL | None:
    """The library `_native` in `folder` that has all `functions`, of the highest level, or None.

    Raises:
        ValueError: `CCE_CPU_LEVEL` is not one of those that this processor has.
    """
    for level in levels_below():
        name = "_native.so" if level == LEVELS[0] else f"_native_{level}.so"
        try:
            found = ctypes.CDLL(str(folder / name))
        except OSError:  # not built, or for another platform
            continue
        if all(hasattr(found, name) for name in functions):  # else built from older sources
            return found
    return None


def loaded(folder: Path, functions: tuple[str, ...]) -> ctypes.CDLL:
    """The same where it is known to be there.

    Raises:
        RuntimeError: it was not built.
    """
    found = library(folder, functions)
    if found is None:
        name = f"{folder.name}/_native"
        raise RuntimeError(f"{name} is not built; install a C++ compiler and this package again")
    return found


class Pointer:
    """A tensor as kernels take it: where its values are, which are of `types`, in a row.

    For the `argtypes` of a C function, as `numpy.ctypeslib.ndpointer` is for arrays, and for
    addresses in a struct, or in what Triton kernels are told of tables.

    Args:
        types: that the kernel reads.
        optional: whether None may stand for the tensor, as NULL.
        by_row: whether rows may be apart, by a stride that the kernel is told.
    """

    def __init__(self, *types: torch.dtype, optional: bool = False, by_row: bool = False) -> None:
        self._types, self._optional, self._by_row = types, optional, by_row

    def address(self, tensor: torch.Tensor, device: torch.device = _CPU) -> int:
        """Where the values of `tensor` are, on the `device` of the kernel.

        Raises:
            TypeError: they are not as stated; a kernel would read or write other memory.
        """
        in_a_row = tensor.stride(-1) == 1 if self._by_row else tensor.is_contiguous()
        if tensor.dtype in self._types and tensor.device == device and in_a_row:
            address = tensor.data_ptr()
            # Tensors of FakeTensorMode, and those whose memory was freed, are nowhere.
            if address or not tensor.numel():
                return address
            raise TypeError(
                f"a compiled kernel got {type(tensor).__name__} {list(tensor.shape)} without values"
            )
        wanted = " or ".join(str(t) for t in self._types)
        raise TypeError(
            f"a compiled kernel takes {wanted} in a row on {device}, and got {tensor.dtype} "
            f"{list(tensor.shape)} with strides {tensor.stride()} on {tensor.device}; convert the "
            "module or tensor back by .to(dtype)"
        )

    def from_param(self, tensor: torch.Tensor | None) -> ctypes.c_void_p | None:
        """What ctypes hands over; it calls this for each argument."""
        if tensor is None and self._optional:
            return None
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"a compiled kernel takes a tensor here, and got {tensor!r}")
        return ctypes.c_void_p(self.address(tensor))


_PACKED = Pointer(torch.uint8)


def packed_codes(codes: torch.Tensor | None, bits: int) -> list[int]:
    """The six numbers by which packing.h has codes of `bits` bits; of None those of no codes."""
    if codes is None or not bits:
        return [0] * 6
    packing, start = CodePacking(bits), _PACKED.address(codes)
    shift = packing.group.bit_length() - 1
    return [start, start + codes.numel(), bits, shift, packing.width, codes.shape[1]]


def operator(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Makes a function of CPU tensors the operator of `schema`, which compiled models can have.

    Args:
        schema: with its name; tensors that the function writes to are marked, as `Tensor(a!)`.
        fake: takes the same arguments without data, and gives what is new: shapes and types.
    """

    def register(function: Callable[..., Any]) -> Any:
        # Not by torch.library.custom_op, whose checks in Python cost each call several times more.
        name = _OPERATORS.define(schema)
        _OPERATORS.impl(name, function, "CPU")
        torch.library.register_fake(f"cce_torchrec::{name}", fake, lib=_OPERATORS)
        return getattr(torch.ops.cce_torchrec, name).default

    return register


def writes_only(*args: Any) -> None:
    """The `fake` of an operator that gives nothing new."""
