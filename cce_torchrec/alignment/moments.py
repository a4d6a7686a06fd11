"""Sums over ids of two tables, from which the measures of alignment follow.

Vectors are read once, in blocks, and never kept; of sharded tables each rank adds up its own ids,
and the sums alone cross the network.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import reduce
from itertools import chain

import torch
import torch.distributed as dist

from cce_torchrec.collectives import agree, ranks_of_call


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
    return total_of(grouped_moments(blocks, 1, group))


def total_of(parts: Sequence[Moments]) -> Moments:
    """The sums over the ids of all parts."""
    if not parts:
        raise ValueError("alignment is one of two ids or more, and there are none")
    return reduce(Moments.__add__, parts)


def grouped_moments(
    blocks: Iterable[tuple[torch.Tensor, ...]],
    groups: int,
    group: dist.ProcessGroup | None = None,
) -> list[Moments]:
    """As `moments`, of `groups` parts of the ids: block i of each rank is of part i % groups.

    By leaving out one after the other, `jackknife` tells how far a measure depends on the ids.

    Raises:
        ValueError: see `moments`.
    """
    group = ranks_of_call(group)
    blocks = iter(blocks)
    first, means = agree(lambda: _first(blocks), group)
    start = next((own for own in means if own is not None), None)
    if start is None:
        raise ValueError("alignment is one of two ids or more, and there are none")
    all_blocks = blocks if first is None else chain([first], blocks)
    _, by_rank = agree(lambda: (None, _added(all_blocks, start, groups)), group)
    # In the order of ranks, so that all have the same bits.
    totals = [total_of(parts) for parts in zip(*by_rank, strict=True)]
    _check(total_of(totals))
    return [total for total in totals if total.ids]


def _first(
    blocks: Iterator[tuple[torch.Tensor, ...]],
) -> tuple[tuple[torch.Tensor, ...] | None, tuple[torch.Tensor, torch.Tensor] | None]:
    """The first block, and the means of its vectors."""
    block = next(blocks, None)
    return block, None if block is None else (block[0].mean(0), block[1].mean(0))


def _added(
    blocks: Iterable[tuple[torch.Tensor, ...]],
    start: tuple[torch.Tensor, torch.Tensor],
    groups: int,
) -> list[Moments]:
    """The sums of this rank's blocks by part."""
    totals = [Moments.of(*(part.new_zeros(0, len(part)) for part in start)) for _ in range(groups)]
    for i, (x, y, *weights) in enumerate(blocks):
        if len(x) != len(y):
            raise ValueError(
                f"the vectors are of {len(x)} and of {len(y)} ids; give both of the same ids, such "
                "as those that both tables have"
            )
        totals[i % groups] += Moments.of(x - start[0], y - start[1], *weights)
    return totals


def _check(total: Moments) -> None:
    if total.ids < 2:
        raise ValueError("alignment is one of two ids or more, and there is one")
    if not (torch.isfinite(total.xx).all() and torch.isfinite(total.yy).all()):
        raise ValueError(
            "the vectors have values that are not finite (NaN or infinite); `cce-torchrec inspect` "
            "says of a checkpoint which table has them"
        )
