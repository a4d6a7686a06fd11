"""The one loader of compiled kernels: C functions, by ctypes, where a compiler built them.

Not a torch extension: building needs no torch, and one library serves every torch. To torch they
are operators all the same, in the namespace `cce_torchrec`, which are registered from Python.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_OPERATORS = torch.library.Library("cce_torchrec", "DEF")


@functools.cache
def library(folder: Path, functions: tuple[str, ...]) -> ctypes.CDLL | None:
    """The library `_native` in `folder` that has all `functions`, or None."""
    for file in sorted(folder.glob("_native*.so")):
        try:
            found = ctypes.CDLL(str(file))
        except OSError:  # built for another platform
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
