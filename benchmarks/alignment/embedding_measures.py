"""How far the tables of several runs agree, with intervals over runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations

import torch

from cce_torchrec.alignment import debiased_cka, moments, neighbourhoods

NEIGHBOURS = 10
SAMPLE = 1024
"""Ids whose neighbours are looked at."""
BINS = (1, 4, 16, 64, 256, 1024)
"""Training examples an id, from which bins begin."""
_FEWEST = 64
"""Ids of which alignment is measured."""
_STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306}
"""97.5 % quantiles by degrees of freedom."""

Tables = Mapping[str, torch.Tensor]


def cka(x: torch.Tensor, y: torch.Tensor) -> float | None:
    """Debiased CKA of vectors; None of too few, or where all are the same."""
    if len(x) < _FEWEST:
        return None
    try:
        return round(debiased_cka(moments([(x.double(), y.double())])), 4)
    except ValueError:
        return None


def shared_neighbours(x: torch.Tensor, y: torch.Tensor) -> float | None:
    """Neighbour overlap of a sample of ids."""
    if len(x) < _FEWEST:
        return None
    at = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:SAMPLE]
    return round(neighbourhoods(x[at], y[at], NEIGHBOURS).overlap.value, 4)


def of_pairs(
    runs: Sequence[Tables],
    name: str,
    ids: torch.Tensor,
    measure: Callable[[torch.Tensor, torch.Tensor], float | None],
) -> list[float | None]:
    """The measure of `ids` of a table for each pair of runs, in the order of `combinations`."""
    return [measure(a[name][ids], b[name][ids]) for a, b in combinations(runs, 2)]


def by_frequency(runs: Sequence[Tables], name: str, counts: torch.Tensor) -> list[list[float]]:
    """Of each bin that has ids enough: its start, its ids, and the CKA of each pair of runs."""
    found = []
    for low, high in zip(BINS, (*BINS[1:], math.inf), strict=True):
        ids = ((counts >= low) & (counts < high)).nonzero()[:, 0]
        values = of_pairs(runs, name, ids, cka)
        if None not in values and values:
            found.append([low, len(ids), *(value for value in values if value is not None)])
    return found


def over_runs(values: Sequence[float], runs: int) -> tuple[float, float]:
    """The mean over pairs of runs, and half of its 95 % interval, by leaving out each run once.

    Pairs that share a run are not independent; runs are.

    Args:
        values: of all pairs, in the order of `combinations`.
        runs: how many.
    """
    pairs = list(combinations(range(runs), 2))
    without = [
        statistics.fmean(v for pair, v in zip(pairs, values, strict=True) if run not in pair)
        for run in range(runs)
    ]
    mean = statistics.fmean(without)
    variance = (runs - 1) / runs * math.fsum((one - mean) ** 2 for one in without)
    return statistics.fmean(values), _STUDENT[runs - 1] * math.sqrt(variance)


def mean_of(values: Sequence[float]) -> tuple[float, float]:
    """The mean of independent values, and half of its 95 % interval by Student."""
    if len(values) < 2:
        return values[0], math.nan
    error = statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values), _STUDENT[len(values) - 1] * error


def shown(pair: tuple[float, float], digits: int = 3) -> str:
    """As tables have it."""
    return f"{pair[0]:.{digits}f} ± {pair[1]:.{digits}f}"
