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
    normed: bool = True
    """Whether the sums of norms were added up; they are 0 otherwise."""

    @classmethod
    def of(
        cls,
        x: torch.Tensor,
        y: torch.Tensor,
        weights: torch.Tensor | None = None,
        *,
        norms: bool = True,
    ) -> Moments:
        """The sums over a block of ids.

        Args:
            x: [n, p], float32 or float64, in which products are made: n is small enough that
                rounding does not matter (some thousands of ids in float32).
            y: [n, q], of the same ids in the same order.
            weights: [n], 0 or more each.
            norms: whether the sums of norms are added up, which `debiased_cka` alone needs, and
                which take a fifth more time.
        """
        ones = x.new_ones(len(x)) if weights is None else weights.to(x.dtype)
        # Norms and ones are columns beside the vectors, so that one product has all sums.
        squares = [torch.linalg.vector_norm(t, dim=1).square() for t in (x, y)] if norms else []
        beside = torch.stack([ones, *squares], dim=1)
        if norms or weights is not None:
            of_x, of_y = ((beside.T @ part).double() for part in (x, y))
        else:  # as fast as can be: this is what CKA takes
            of_x, of_y = (part.sum(0, keepdim=True).double() for part in (x, y))
        of_norms = (beside.T @ beside).double()
        # Weights once in each product, not their square.
        left, right = (x, y) if weights is None else (x * ones[:, None], y * ones[:, None])
        return cls(
            ids=len(x),
            weight=ones.double().sum(),
            x=of_x[0],
            y=of_y[0],
            xx=(left.T @ x).double(),
            xy=(left.T @ y).double(),
            yy=(right.T @ y).double(),
            x_norms=of_norms[[0, 1, 2], [1, 1, 1]] if norms else of_norms.new_zeros(3),
            y_norms=of_norms[[0, 2, 2], [2, 2, 1]] if norms else of_norms.new_zeros(3),
            x_by_norms=of_x[[1, 2]] if norms else of_x.new_zeros(2, x.shape[1]),
            y_by_norms=of_y[[2, 1]] if norms else of_y.new_zeros(2, y.shape[1]),
            weighted=weights is not None,
            normed=norms,
        )

    def __add__(self, other: Moments) -> Moments:
        """The sums over the ids of both."""
        sums = {name: getattr(self, name) + getattr(other, name) for name in _SUMS}
        return Moments(
            ids=self.ids + other.ids,
            weighted=self.weighted or other.weighted,
            normed=self.normed and other.normed,
            **sums,
        )


_SUMS = tuple(one.name for one in fields(Moments) if one.name not in ("ids", "weighted", "normed"))


def moments(
    blocks: Iterable[tuple[torch.Tensor, ...]],
    group: dist.ProcessGroup | None = None,
    *,
    norms: bool = True,
) -> Moments:
    """The sums over all blocks of ids. Collective where there is a process group.

    Vectors far from the origin are moved by the mean of the first block, which changes no measure
    and keeps large means from taking the digits of small differences.

    Args:
        blocks: (x, y) or (x, y, weights) each; of this rank's ids.
        group: ranks that add up ids each; default: all of the job.
        norms: see `Moments.of`.

    Raises:
        ValueError: fewer than two ids, blocks of unequal numbers of ids, or values that are no
            finite numbers.
    """
    return total_of(grouped_moments(blocks, 1, group, norms=norms))


def total_of(parts: Sequence[Moments]) -> Moments:
    """The sums over the ids of all parts."""
    if not parts:
        raise ValueError("alignment is one of two ids or more, and there are none")
    return reduce(Moments.__add__, parts)


def grouped_moments(
    blocks: Iterable[tuple[torch.Tensor, ...]],
    groups: int,
    group: dist.ProcessGroup | None = None,
    *,
    norms: bool = True,
) -> list[Moments]:
    """As `moments`, of `groups` parts of the ids: block i of each rank is of part i % groups.

    By leaving out one after the other, `jackknife` tells how far a measure depends on the ids.

    Raises:
        ValueError: see `moments`.
    """
    group = ranks_of_call(group)
    blocks = iter(blocks)
    # All ranks move by one point: sums of vectors that were moved unlike do not add up.
    first, means = agree(lambda: _first(blocks), group)
    start = next((own for own in means if own is not None), None)
    if start is None:
        raise ValueError("alignment is one of two ids or more, and there are none")
    # The first block was only looked at.
    all_blocks = blocks if first is None else chain([first], blocks)
    _, by_rank = agree(lambda: (None, _added(all_blocks, start, groups, norms)), group)
    # In the order of ranks, so that all have the same bits.
    totals = [total_of(parts) for parts in zip(*by_rank, strict=True)]
    _check(total_of(totals))
    # Of few blocks some parts have no ids, and leaving them out would count as certainty.
    return [total for total in totals if total.ids]


def _first(
    blocks: Iterator[tuple[torch.Tensor, ...]],
) -> tuple[tuple[torch.Tensor, ...] | None, tuple[torch.Tensor, torch.Tensor] | None]:
    """The first block, and by what vectors are moved."""
    block = next(blocks, None)
    if block is None or not len(block[0]):
        return block, None
    return block, (_far(block[0]), _far(block[1]))


def _far(x: torch.Tensor) -> torch.Tensor:
    """The mean where it is larger than the spread around it, and 0 otherwise."""
    mean = x.mean(0)
    # Moving costs a pass over the block, and small means lose no digits.
    return mean if mean.square().sum() > (x - mean).square().sum() / len(x) else mean * 0


def _added(
    blocks: Iterable[tuple[torch.Tensor, ...]],
    start: tuple[torch.Tensor, torch.Tensor],
    groups: int,
    norms: bool,
) -> list[Moments]:
    """The sums of this rank's blocks by part."""
    empty = Moments.of(*(part.new_zeros(0, len(part)) for part in start), norms=norms)
    totals = [empty for _ in range(groups)]
    moved = [bool((part != 0).any()) for part in start]
    for i, (x, y, *weights) in enumerate(blocks):
        if len(x) != len(y):
            raise ValueError(
                f"the vectors are of {len(x)} and of {len(y)} ids; give both of the same ids, such "
                "as those that both tables have"
            )
        x, y = (
            part - by if far else part for part, by, far in zip((x, y), start, moved, strict=True)
        )
        totals[i % groups] += Moments.of(x, y, *weights, norms=norms)
    return totals


def _check(total: Moments) -> None:
    if total.ids < 2:
        raise ValueError("alignment is one of two ids or more, and there is one")
    if not (torch.isfinite(total.xx).all() and torch.isfinite(total.yy).all()):
        raise ValueError(
            "the vectors have values that are not finite (NaN or infinite); `cce-torchrec inspect` "
            "says of a checkpoint which table has them"
        )
