"""Bars that show how far long work is, where a person is looking on."""

from __future__ import annotations

import sys
from typing import Any

import torch.distributed as dist
from tqdm import tqdm


def bar(total: int, what: str, unit: str, *, initial: int = 0) -> tqdm[Any]:
    """A bar on the first rank of the job if its stderr is a terminal; elsewhere one that is silent.

    Args:
        total: of units.
        what: is worked on, the words before the bar.
        unit: "step", "id"; "B" is shown as kB, MB and so on.
        initial: units that were done before.
    """
    in_a_job = dist.is_available() and dist.is_initialized()
    return tqdm(
        total=total,
        initial=initial,
        desc=what,
        unit=unit,
        unit_scale=unit == "B",
        leave=False,
        disable=not sys.stderr.isatty() or (in_a_job and dist.get_rank() != 0),
    )
