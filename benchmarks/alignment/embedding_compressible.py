"""Whether alignment of full tables between runs tells what compressing them costs."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from benchmarks.alignment.embedding_sharing import rank_correlation
from benchmarks.alignment.parts import Record

_DRAWS = 4000
_FEWEST = 6
PREDICTORS = {
    "cka": "CKA of full tables",
    "neighbours": "their neighbours shared",
    "examples": "examples an id",
    "loss": "log loss of full tables",
}
Point = dict[str, float]


def points(records: Sequence[Record], middle: Mapping[str, str]) -> list[tuple[str, Point]]:
    """Of each data set and kind of data: the predictors, and how much higher the loss of ours is.

    Args:
        records: of the part `tables`.
        middle: of each data set the budget of ours.
    """
    by = {(r["on"], r["share"], r["flipped"], r["method"], r["budget"]): r for r in records}
    out = []
    for (on, share, flipped, method, _), full in by.items():
        ours = by.get((on, share, flipped, "ours", middle[on]))
        if method != "full" or ours is None:
            continue
        tables = list(full["tables"].values())
        loss = statistics.fmean(full["log_loss"])
        point = {key: _mean(v for t in tables for v in t[key]) for key in ("cka", "neighbours")}
        point["examples"] = _mean(t["examples"] for t in tables)
        point["loss"] = loss
        point["increase"] = statistics.fmean(ours["log_loss"]) - loss
        out.append((on, point))
    return out


def _mean(values: Iterable[float | None]) -> float:
    return statistics.fmean(value for value in values if value is not None)


def permutation_p(x: np.ndarray, y: np.ndarray) -> float:
    """The share of shuffled pairings with a rank correlation as far from 0 as this one's."""
    own, g = abs(rank_correlation(x, y)), np.random.default_rng(0)
    found = [abs(rank_correlation(x, g.permutation(y))) for _ in range(_DRAWS)]
    return (1 + sum(one >= own - 1e-9 for one in found)) / (1 + _DRAWS)


def lines_of(records: Sequence[Record], middle: Mapping[str, str]) -> list[str]:
    """Markdown: rank correlation of each predictor with the increase of loss."""
    found = points(records, middle)
    out = [
        "By how much the log loss of ours, at the middle budget, is above that of full tables on "
        "the same data: rank correlation over kinds of data, with p by permutation.",
        "",
        f"| data | kinds | increase | {' | '.join(PREDICTORS.values())} |",
        "| --- " * (3 + len(PREDICTORS)) + "|",
    ]
    for on in [*dict.fromkeys(on for on, _ in found), "all"]:
        own = [point for name, point in found if on in (name, "all")]
        if len(own) < _FEWEST:
            continue
        harm = np.array([point["increase"] for point in own])
        row = [on, str(len(own)), f"{harm.min():+.4f} to {harm.max():+.4f}"]
        for key in PREDICTORS:
            x = np.array([point[key] for point in own])
            row.append(f"{rank_correlation(harm, x):+.2f} (p = {permutation_p(harm, x):.3f})")
        out.append(f"| {' | '.join(row)} |")
    return out
