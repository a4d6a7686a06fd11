"""Which ids are compared, and which of them are a rank's own."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist

from cce_torchrec.codes.hashing import hash_function

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
