"""Bars that show how far long work is, where a person is looking on."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch.distributed as dist
from tqdm import tqdm

_DELAY = 1.0
"""Seconds that work takes before a bar is shown: most is done by then."""
_BLOCK = 1 << 24
"""Bytes between two updates of a bar."""


def bar(total: int, what: str, unit: str, *, initial: int = 0) -> tqdm[Any]:
    """A bar on the first rank of the job if its stderr is a terminal; elsewhere one that is silent.

    Args:
        total: of units.
        what: is worked on, the words before the bar.
        unit: "step", "id"; "B" is shown as kB, MB and so on.
        initial: units that were done before.
    """
    alone = not (dist.is_available() and dist.is_initialized())
    return tqdm(
        total=total,
        initial=initial,
        desc=what,
        unit=unit,
        unit_scale=unit == "B",
        leave=False,
        delay=_DELAY,
        disable=not sys.stderr.isatty() or not (alone or dist.get_rank() == 0),
    )


def in_blocks(parts: Iterable[Any], total: int, what: str) -> Iterator[memoryview]:
    """The bytes of `parts`, `total` in all, in blocks of 16 MiB with a bar of those taken."""
    shown = bar(total, what, "B")
    for part in parts:
        view = memoryview(part)
        if not view.nbytes:  # which cannot be cast
            continue
        view = view.cast("B")
        for first in range(0, len(view), _BLOCK):
            block = view[first : first + _BLOCK]
            yield block
            shown.update(len(block))
    shown.close()
