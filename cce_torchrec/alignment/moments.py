"""Sums over ids of two tables, from which the measures of alignment follow.

Vectors are read once, in blocks, and never kept; of sharded tables each rank adds up its own ids,
and the sums alone cross the network.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from itertools import chain

import torch
import torch.distributed as dist

from cce_torchrec.collectives import gather


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Sums over ids i of the vectors x_i [p] and y_i [q], in float64.

    With weights w_i (1 without), which count an id as often as it is looked up.
    """

    ids: int
    """Ids that were added up, those of weight 0 too."""
    weight: torch.Tensor
    """Sum of w_i, a scalar."""
    x: torch.Tensor
    """Sum of w_i x_i, [p]."""
    y: torch.Tensor
    """The same of y, [q]."""
    xx: torch.Tensor
    """Sum of w_i x_i x_i', [p, p]."""
    xy: torch.Tensor
    """Sum of w_i x_i y_i', [p, q]."""
    yy: torch.Tensor
    """Sum of w_i y_i y_i', [q, q]."""
    x_norms: torch.Tensor
    """Sums of |x_i|^2 times 1, |x_i|^2 and |y_i|^2, [3]; of unweighted ids."""
    y_norms: torch.Tensor
    """Sums of |y_i|^2 times 1, |y_i|^2 and |x_i|^2, [3]."""
    x_by_norms: torch.Tensor
    """Sums of x_i times |x_i|^2 and times |y_i|^2, [2, p]."""
    y_by_norms: torch.Tensor
    """Sums of y_i times |y_i|^2 and times |x_i|^2, [2, q]."""
    weighted: bool = False
    """Whether weights were given, in which case the sums of norms are not those of ids."""

    @classmethod
    def of(cls, x: torch.Tensor, y: torch.Tensor, weights: torch.Tensor | None = None) -> Moments:
        """The sums over a block of ids.

        Args:
            x: [n, p], float32 or float64, in which products are made: n is small enough that
                rounding does not matter (some thousands of ids in float32).
            y: [n, q], of the same ids in the same order.
            weights: [n], 0 or more each.
        """
        a, b = torch.linalg.vecdot(x, x), torch.linalg.vecdot(y, y)
        ones = torch.ones_like(a) if weights is None else weights.to(a.dtype)
        # Norms and ones are columns beside the vectors, so that one product has all sums.
        beside = torch.stack([ones, a, b], dim=1)
        left = x if weights is None else x * ones[:, None]
        of_x, of_y = (x.T @ beside).double(), (y.T @ beside).double()
        norms = (beside.T @ beside[:, 1:]).double()
        return cls(
            ids=len(x),
            weight=ones.double().sum(),
            x=of_x[:, 0],
            y=of_y[:, 0],
            xx=(left.T @ x).double(),
            xy=(left.T @ y).double(),
            yy=(y.T @ y if weights is None else (y * ones[:, None]).T @ y).double(),
            x_norms=norms[[0, 1, 2], [0, 0, 0]],
            y_norms=norms[[0, 2, 1], [1, 1, 1]],
            x_by_norms=of_x[:, 1:].T,
            y_by_norms=of_y[:, [2, 1]].T,
            weighted=weights is not None,
        )

    def __add__(self, other: Moments) -> Moments:
        """The sums over the ids of both."""
        sums = {name: getattr(self, name) + getattr(other, name) for name in _SUMS}
        weighted = self.weighted or other.weighted
        return Moments(ids=self.ids + other.ids, weighted=weighted, **sums)

    def of_all_ranks(self, group: dist.ProcessGroup | None = None) -> Moments:
        """The sums over the ids of all ranks, each of which has others. Collective.

        Every rank adds them up in the order of ranks, and so has the same bits.
        """
        if not dist.is_initialized():
            return self
        own = torch.cat([getattr(self, name).reshape(-1) for name in _SUMS])
        own = torch.cat([own, torch.tensor([self.ids, self.weighted], dtype=own.dtype)])
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, own, group=group)
        total = torch.stack(parts).sum(0)
        sums, at = {}, 0
        for name in _SUMS:
            shape = getattr(self, name).shape
            sums[name] = total[at : at + shape.numel()].view(shape)
            at += shape.numel()
        return Moments(ids=int(total[-2]), weighted=bool(total[-1]), **sums)


_SUMS = tuple(one.name for one in fields(Moments) if one.name not in ("ids", "weighted"))


def moments(
    blocks: Iterable[tuple[torch.Tensor, ...]], group: dist.ProcessGroup | None = None
) -> Moments:
    """The sums over all blocks of ids. Collective where there is a process group.

    All vectors are moved by the mean of the first block, which changes no measure and keeps large
    means from taking the digits of small differences.

    Args:
        blocks: (x, y) or (x, y, weights) each; of this rank's ids.

    Raises:
        ValueError: fewer than two ids, blocks of unequal numbers of ids, or values that are no
            finite numbers.
    """
    blocks = iter(blocks)
    first = next(blocks, None)
    start = _start(first, group)
    total: Moments | None = None
    for x, y, *weights in blocks if first is None else chain([first], blocks):
        if len(x) != len(y):
            raise ValueError(
                f"the vectors are of {len(x)} and of {len(y)} ids; give both of the same ids, such "
                "as those that both tables have"
            )
        block = Moments.of(x - start[0], y - start[1], *weights)
        total = block if total is None else total + block
    if total is None:
        total = Moments.of(*(part.new_zeros(0, len(part)) for part in start))
    total = total.of_all_ranks(group)
    _check(total)
    return total


def _start(
    block: tuple[torch.Tensor, ...] | None, group: dist.ProcessGroup | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Means of the first block of the first rank that has one."""
    own = None if block is None else (block[0].mean(0), block[1].mean(0))
    found = [one for one in gather(own, group) if one is not None]
    if not found:
        raise ValueError("alignment is one of two ids or more, and there are none")
    return found[0]


def _check(total: Moments) -> None:
    if total.ids < 2:
        raise ValueError("alignment is one of two ids or more, and there is one")
    if not (torch.isfinite(total.xx).all() and torch.isfinite(total.yy).all()):
        raise ValueError(
            "the vectors have values that are not finite (NaN or infinite); `cce-torchrec inspect` "
            "says of a checkpoint which table has them"
        )
