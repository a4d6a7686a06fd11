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

_PIECE = 2048
"""Ids whose vectors are in a core's cache at once, about: 1 MB of 64 dimensions of two tables."""


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
    """Sums of |y_i|^2 times the same, [3]."""
    x_by_norms: torch.Tensor
    """Sums of x_i times |x_i|^2 and times |y_i|^2, [2, p]."""
    y_by_norms: torch.Tensor
    """Sums of y_i times the same, [2, q]."""
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
            x: [n, p]. Products are made in float32, or in float64 if x or y is: n is small enough
                that rounding does not matter (some thousands of ids in float32).
            y: [n, q], of the same ids in the same order.
            weights: [n], 0 or more each.
            norms: whether the sums of norms are added up, which `debiased_cka` alone needs, and
                which take a quarter more time.
        """
        # Half precision has too few digits for products.
        dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
        ones = x.new_ones(len(x)) if weights is None else weights
        sums = _products(x.to(dtype), y.to(dtype), ones.to(dtype), weights is not None, norms)
        xx, xy, yy, of_x, of_y, of_norms = sums
        return cls(
            ids=len(x),
            weight=ones.double().sum(),
            x=of_x[0],
            y=of_y[0],
            xx=xx,
            xy=xy,
            yy=yy,
            x_norms=of_norms[1],
            y_norms=of_norms[2],
            x_by_norms=of_x[1:],
            y_by_norms=of_y[1:],
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


def _products(
    x: torch.Tensor, y: torch.Tensor, weights: torch.Tensor, weighted: bool, norms: bool
) -> list[torch.Tensor]:
    """x'x, x'y, y'y, and products of [1, |x|^2, |y|^2] with x, y and itself; without norms of 1."""
    rows = 3 if norms else 1
    shapes = [(x.shape[1],) * 2, (x.shape[1], y.shape[1]), (y.shape[1],) * 2]
    shapes += [(3, x.shape[1]), (3, y.shape[1]), (3, 3)]
    xx, xy, yy, of_x, of_y, of_norms = sums = [x.new_zeros(shape) for shape in shapes]
    # In pieces that stay in a core's cache while all products read them.
    size = _PIECE if x.device.type == "cpu" else max(1, len(x))
    for part, other, ones in zip(x.split(size), y.split(size), weights.split(size), strict=True):
        # Norms and ones are rows of one matrix, so that one product has all sums.
        norms_of = [torch.linalg.vector_norm(t, dim=1).square_() for t in (part, other) if norms]
        beside = torch.stack([ones, *norms_of]) if norms else ones[None]
        # Weights once in each product, not their square.
        left, right = (t * ones[:, None] if weighted else t for t in (part, other))
        xx.addmm_(left.T, part)
        xy.addmm_(left.T, other)
        yy.addmm_(right.T, other)
        of_x[:rows].addmm_(beside, part)
        of_y[:rows].addmm_(beside, other)
        if norms:
            of_norms.addmm_(beside, beside.T)
    return [total.double() for total in sums]


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
    x = x.to(torch.promote_types(x.dtype, torch.float32))
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
