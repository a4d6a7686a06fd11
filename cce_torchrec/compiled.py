"""The one loader of compiled kernels: C functions, by ctypes, where a compiler built them.

Not a torch extension: building needs no torch, and one library serves every torch.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path


@functools.cache
def library(folder: Path, functions: tuple[str, ...]) -> ctypes.CDLL | None:
    """The library `_native` in `folder` that has all `functions`, or None."""
    for file in sorted(folder.glob("_native*.so")):
        try:
            loaded = ctypes.CDLL(str(file))
        except OSError:  # built for another platform
            continue
        if all(hasattr(loaded, name) for name in functions):  # else built from older sources
            return loaded
    return None
