"""What many numbers are like, in a few: quantiles and histograms, as plain JSON."""

from __future__ import annotations

from typing import Any

import numpy as np

_QUANTILES = {"min": 0.0, "p5": 0.05, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p95": 0.95, "max": 1.0}
BINS = 40
"""Most bins of a histogram."""


def rounded(value: float) -> float | None:
    """Six digits of a number, which make no difference to a reader; None if it is not finite."""
    # Plain JSON has no NaN.
    return float(f"{value:.6g}") if np.isfinite(value) else None


def distribution(values: np.ndarray[Any, Any]) -> dict[str, Any]:
    """Mean, quantiles, and a histogram of at most `BINS` equal bins, of the finite `values` [n].

    Returns:
        {"mean", "quantiles": {"min", "p5", "p25", "p50", "p75", "p95", "max"}, "edges", "counts"};
        None for all numbers and no bins where there is no finite value.
    """
    finite = values[np.isfinite(values)]
    if not len(finite):
        return {"mean": None, "quantiles": dict.fromkeys(_QUANTILES), "edges": [], "counts": []}
    quantiles = np.quantile(finite, list(_QUANTILES.values()))
    low, high = float(finite.min()), float(finite.max())
    # Equal values are one bin: numpy would invent a range around them.
    counts, edges = (
        np.histogram(finite, bins=BINS, range=(low, high))
        if high > low and np.isfinite(high - low)
        else (np.array([len(finite)]), np.array([low, high]))
    )
    return {
        "mean": rounded(float(finite.mean())),
        "quantiles": dict(zip(_QUANTILES, map(rounded, map(float, quantiles)), strict=True)),
        "edges": [rounded(float(edge)) for edge in edges],
        "counts": counts.tolist(),
    }


def count_histogram(counts: np.ndarray[Any, Any]) -> dict[str, Any]:
    """A histogram of whole numbers from 0 on, in bins that grow with the numbers.

    Returns:
        {"edges", "counts"}: bin i has the numbers from edges[i] up to, but without, edges[i + 1].
    """
    if not len(counts):
        return {"edges": [], "counts": []}
    most = int(counts.max())
    # Zero has a bin of its own; codes of a few ids and of many are both of interest.
    edges = [0, 1]
    while edges[-1] <= most:
        edges.append(max(edges[-1] + 1, int(edges[-1] * 1.5)))
    found, _ = np.histogram(counts, bins=[*edges[:-1], edges[-1]])
    # numpy's last bin has its right edge, too, which no count is at.
    return {"edges": edges, "counts": found.tolist()}
