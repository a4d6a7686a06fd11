"""The cells of the parts `networks-*`."""

from __future__ import annotations

from benchmarks.alignment.small_networks import NetworkCell
from benchmarks.alignment.small_problems import PROBLEMS

SEEDS, QUICK_SEEDS = 16, 5


def cells(problem: str, quick: bool) -> list[NetworkCell]:
    """All of a problem, or of `--quick` two strengths of each noise and every other size."""
    of = PROBLEMS[problem]
    return [
        NetworkCell(
            problem=problem,
            noise=noise,
            strength=strength,
            size=size,
            seeds=QUICK_SEEDS if quick else SEEDS,
        )
        for noise, strengths in of.noises.items()
        for strength in (strengths[1::2] if quick else strengths)
        for size in (of.sizes[:-1:2] if quick else of.sizes)
    ]
