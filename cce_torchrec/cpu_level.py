"""The level of CPU instructions that compiled kernels may use: the one rule for all of them.

setup.py builds each library of kernels once for every level. Which one a process loads is decided
here, once, by what torch found the processor to have; so `ATEN_CPU_CAPABILITY`, which lowers the
kernels of torch, lowers these too. `CCE_CPU_LEVEL` lowers these alone, for tests and reports of
bugs.
"""

from __future__ import annotations

import os

import torch

LEVELS = ("none", "avx2", "avx512")
"""Lowest first: what every processor has; AVX2 and FMA; AVX-512 F, BW, DQ and VL with them."""
VARIABLE = "CCE_CPU_LEVEL"


def highest_level() -> str:
    """The highest level that this processor has."""
    found = torch.backends.cpu.get_cpu_capability().lower()
    # Upwards of AVX-512 torch may know more, whose names begin alike.
    return next((level for level in reversed(LEVELS) if found.startswith(level)), "none")


def cpu_level() -> str:
    """The level of the kernels of this process: that of `CCE_CPU_LEVEL`, or the highest there is.

    Raises:
        ValueError: the variable names none, or one that this processor lacks.
    """
    highest, wanted = highest_level(), os.environ.get(VARIABLE)
    if wanted is None:
        return highest
    allowed = LEVELS[: LEVELS.index(highest) + 1]
    if wanted not in allowed:
        raise ValueError(
            f"{VARIABLE} is {wanted!r}, and this processor runs {', '.join(allowed)}; name one of "
            "these, or unset it for the highest"
        )
    return wanted


def levels_below() -> tuple[str, ...]:
    """The level of this process and those that its processor runs as well, highest first."""
    return LEVELS[LEVELS.index(cpu_level()) :: -1]
