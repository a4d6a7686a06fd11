"""Weighted sums of floats that are the same bytes in any order of their terms."""

from __future__ import annotations

import math

import torch

_WORD_BITS = 28
_WORDS = 3
"""84 bits below the largest magnitude: what is 1e-18 of it keeps the 24 bits of a float32."""
_LEAST_EXPONENT = -900
"""Below it scales would overflow: then bits count from 2^-900 on, far below any float32."""
_CPU_POINTS = 1 << 13
"""Added up at once: stays in a cache."""
_GPU_VALUES = 1 << 22
"""Elsewhere: 200 MiB of temporaries, and few launches."""


def weighted_sums(
    values: torch.Tensor,
    *,
    rows: torch.Tensor,
    weights: torch.Tensor,
    clusters: torch.Tensor,
    num_clusters: int,
) -> torch.Tensor:
    """Per cluster the sum over its points of weight times the value's row; float64 [k, d].

    On a GPU `index_add_` adds by atomics, in an order that differs from run to run, and sums of
    floats with it. So values are cut into words of 28 bits below the largest magnitude, the words
    are added up as integers, and only the sums become floats again: copies of a table on several
    ranks get the same bytes. Waits for the device once.

    Args:
        values: float64 [n, d], finite.
        rows: per point, which row of `values` it has; any integers [p].
        weights: per point, int64 [p], at least 0 and at most 2^33 in all
            (`cce_torchrec.kmeans.points.MAX_WEIGHT`): then no sum of words passes 2^61.
        clusters: per point, any integers [p].
        num_clusters: k.
    """
    largest = float(values.abs().max()) if values.numel() else 0.0
    assert math.isfinite(largest)
    exponent = max(math.frexp(largest)[1], _LEAST_EXPONENT)  # largest < 2^exponent
    words = _words(values, exponent)
    dim, width = values.shape[1], words.shape[1]
    sums = torch.zeros(num_clusters, width, dtype=torch.int64, device=values.device)
    block = _CPU_POINTS if values.device.type == "cpu" else max(_CPU_POINTS, _GPU_VALUES // dim)
    for first in range(0, rows.numel(), block):
        at = slice(first, first + block)
        weighted = words[rows[at].long()] * weights[at, None]
        sums.index_add_(0, clusters[at].long(), weighted)
    total = torch.zeros(num_clusters, dim, dtype=torch.float64, device=values.device)
    for part in reversed(sums.split(dim, dim=1)):  # from the smallest
        total = total * 2.0**-_WORD_BITS + part.double()
    return total * 2.0 ** (exponent - _WORD_BITS)


def _words(values: torch.Tensor, exponent: int) -> torch.Tensor:
    """`values` / 2^exponent as words below 2^28 in magnitude, the highest first; int64 [n, 3 d].

    Every step is exact but the last word's rounding.
    """
    rest = values * 2.0**-exponent
    words: list[torch.Tensor] = []
    for _ in range(_WORDS):
        rest = rest * 2.0**_WORD_BITS
        words.append(rest.trunc() if len(words) < _WORDS - 1 else rest.round())
        rest = rest - words[-1]
    return torch.cat(words, dim=1).long()
