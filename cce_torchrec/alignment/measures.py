"""All measures of alignment at once, with their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cce_torchrec.alignment.interval import Interval, jackknife
from cce_torchrec.alignment.linear import (
    debiased_cka,
    linear_cka,
    mean_cca,
    procrustes_distance,
    svcca,
)
from cce_torchrec.alignment.moments import Moments
from cce_torchrec.alignment.neighbours import Neighbourhoods

GROUPS = 32
"""Parts of the ids by which intervals are found."""
SAMPLE = 4096
"""Ids whose neighbours are looked at, if nothing else is said."""


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """How vectors of two sides are aligned; of each measure see the function of its name."""

    ids: int
    """Ids, or examples, that were added up."""
    linear_cka: Interval
    debiased_cka: Interval | None
    """None where ids are weighted, or fewer than 8."""
    procrustes_distance: Interval
    mean_cca: Interval | None
    """None, as `svcca`, of no more ids than dimensions: it is 1 there whatever they are."""
    svcca: Interval | None
    neighbours: Neighbourhoods | None
    """None of fewer ids than that takes."""
    codes: list[float] | None
    """`adjusted_mutual_information` of each chunk, where both tables have codes of as many."""


def all_measures(
    parts: Sequence[Moments], near: Neighbourhoods | None, codes: list[float] | None = None
) -> Alignment:
    """The measures that follow from the sums of all parts of the ids, beside those at hand.

    Raises:
        ValueError: fewer than two ids, or constant vectors.
    """
    ids = sum(part.ids for part in parts)
    # An estimate without a part of the ids, too, wants four.
    unfit = ids < 8 or any(part.weighted for part in parts)
    flat = ids <= max(max(len(part.x), len(part.y)) for part in parts)
    return Alignment(
        ids=ids,
        linear_cka=jackknife(linear_cka, parts),
        debiased_cka=None if unfit else jackknife(debiased_cka, parts),
        procrustes_distance=jackknife(procrustes_distance, parts),
        mean_cca=None if flat else jackknife(mean_cca, parts),
        svcca=None if flat else jackknife(svcca, parts),
        neighbours=near,
        codes=codes,
    )
