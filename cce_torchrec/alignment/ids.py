"""Which ids are compared, and which of them are a rank's own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from cce_torchrec.codes.hashing import hash_function

Names = Sequence[Any] | np.ndarray
"""Of all ids of a table: texts or whole numbers."""
_ROLE = 98
"""Parts the hash by which ids are drawn from all others."""


def ranges(count: int, size: int, group: dist.ProcessGroup | None) -> Iterator[tuple[int, int]]:
    """This rank's share of `count` ids in blocks, as many as every other's: the last may be empty.

    Args:
        count: ids.
        size: of a block.
        group: ranks that share them; None: this process has all.
    """
    rank, ranks = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    for begin in range(0, count, ranks * size):
        first = min(count, begin + rank * size)
        yield first, min(count, first + size)


def drawn(ids: int, sample: int) -> torch.Tensor:
    """Ids [at most `sample`] of `ids`, ascending: by a hash, and so the same for any two tables."""
    if ids <= sample:
        return torch.arange(ids)
    return torch.unique(draw_hash(torch.arange(sample), ids))


def draw_hash(numbers: torch.Tensor, below: int) -> torch.Tensor:
    """A hash [n] in [0, below) of integers [n]."""
    return hash_function(0, "", 0, role=_ROLE)(numbers, below)


def same_names(
    names: tuple[Names, Names], sizes: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [n] of the first table, ascending, and of the second [n], that have the same names.

    Args:
        names: of all ids of either table, texts or whole numbers.
        sizes: of the tables.

    Raises:
        ValueError: other numbers of names than ids, a name that is there twice, or no two names in
            common.
    """
    own = [np.asarray(side) for side in names]
    for which, side, size in zip(("first", "second"), own, sizes, strict=True):
        if side.shape != (size,):
            raise ValueError(f"the {which} table has {size:,} ids, and names of {side.shape}")
        if len(np.unique(side)) < size:
            raise ValueError(f"a name of the {which} table is that of several of its ids")
    _, first, second = np.intersect1d(own[0], own[1], assume_unique=True, return_indices=True)
    if len(first) < 2:
        raise ValueError(
            f"of {sizes[0]:,} and {sizes[1]:,} names the tables have {len(first)} in common; "
            "alignment is one of two ids or more"
        )
    order = np.argsort(first)
    return torch.from_numpy(first[order]), torch.from_numpy(second[order])
