"""Measures of alignment that look at who is near whom, over a sample of ids."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cce_torchrec.alignment.interval import Interval, jackknife_of_means

_PAIRS = 1 << 24
"""Distances that are in memory at a time, of each table."""


@dataclass(frozen=True, kw_only=True)
class Neighbourhoods:
    """What two tables say of the neighbours of the same ids."""

    overlap: Interval
    """Mean share of an id's k nearest in one that are among its k nearest in the other: 0 to 1,
    k / (n - 1) under independence."""
    imbalance: Interval
    """Information imbalance from x to y: about 0 where x tells the neighbours of y, 1 where it
    tells nothing."""
    imbalance_back: Interval
    """The same from y to x."""
    ids: int
    k: int


def neighbourhoods(x: torch.Tensor, y: torch.Tensor, k: int = 10) -> Neighbourhoods:
    """Neighbour overlap and information imbalance, by Euclidean distances, exactly.

    Ids with the same distance, which tables of shared rows have many of, count as if their order
    were drawn at random: the result is the mean over all orders, and so depends on no draw.
    Invariant to rotations, shifts and one scale for each table. Cost: O(n^2 (p + q + log n)) time,
    0.5 GB of memory.

    The imbalance is 2 / n times the mean rank in y of an id's k nearest in x (k = 1 in the paper).

    Args:
        x: [n, p], of a sample of ids.
        y: [n, q], of the same ids in the same order.
        k: neighbours.

    Source: Glielmo et al., "Ranking the information content of distance measures", PNAS Nexus 2022.

    Raises:
        ValueError: fewer ids than `k` + 2, unequal numbers of ids, constant vectors, or values that
            are no finite numbers.
    """
    _check(x, y, k)
    n = len(x)
    # A few ids at a time against all: distances of all pairs would take n^2.
    found: list[torch.Tensor] = []
    rows = max(1, _PAIRS // n)
    for start in range(0, n, rows):
        own = torch.arange(start, min(start + rows, n))
        near_x, near_y = _distances(x, own), _distances(y, own)
        chosen_x, chosen_y = _chances(near_x, k), _chances(near_y, k)
        products = chosen_x * chosen_y, chosen_x * _ranks(near_y), chosen_y * _ranks(near_x)
        found.append(torch.stack([product.sum(1) / k for product in products]))
    overlap, forth, back = torch.cat(found, dim=1).tolist()
    return Neighbourhoods(
        overlap=jackknife_of_means(overlap),
        imbalance=jackknife_of_means(forth, 2 / n),
        imbalance_back=jackknife_of_means(back, 2 / n),
        ids=n,
        k=k,
    )


def _check(x: torch.Tensor, y: torch.Tensor, k: int) -> None:
    if len(x) != len(y):
        raise ValueError(
            f"the vectors are of {len(x)} and of {len(y)} ids; give both of the same ids, such as "
            "those that both tables have"
        )
    if k < 1 or len(x) < k + 2:
        raise ValueError(
            f"{len(x)} ids have no {k} neighbours that could be others; use k from 1 to "
            f"{len(x) - 2}, or more ids"
        )
    for which, part in (("first", x), ("second", y)):
        if not torch.isfinite(part).all():
            raise ValueError(f"the {which} table has values that are not finite (NaN or infinite)")
        if torch.equal(part, part[:1].expand_as(part)):
            raise ValueError(
                f"all ids of the {which} table have the same vector, so that none is nearer than "
                "another; was it trained?"
            )


def _distances(x: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """Distances [b, n] from ids `own` to all; infinite to themselves."""
    # Not by products, whose rounding would tell equal vectors apart.
    found = torch.cdist(x[own], x, compute_mode="donot_use_mm_for_euclid_dist")
    found[torch.arange(len(own)), own] = torch.inf
    return found


def _chances(distances: torch.Tensor, k: int) -> torch.Tensor:
    """How probable it is for each to be among the k nearest where equal ones are shuffled."""
    kth = distances.kthvalue(k, dim=1, keepdim=True).values
    # All nearer ones, and an equal share of those at the distance of the k-th.
    nearer, equal = distances < kth, distances == kth
    left = k - nearer.sum(1, keepdim=True)
    return nearer.double() + equal * (left / equal.sum(1, keepdim=True)).double()


def _ranks(distances: torch.Tensor) -> torch.Tensor:
    """The rank of each, 1 for the nearest, and the middle of their ranks for equal ones."""
    ordered = distances.sort(dim=1).values
    before = torch.searchsorted(ordered, distances)
    up_to = torch.searchsorted(ordered, distances, right=True)
    return (before + up_to + 1).double() / 2
