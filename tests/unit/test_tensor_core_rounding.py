"""The tolerances of nearest centroids against a model of how tensor cores add up."""

import math
import random

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from cce_torchrec.kmeans.triton_search import tolerances, turn_error

GENERATIONS = {9: (16, 2), 8: (8, 1), 7: (4, 0)}
"""Products that are aligned at once, and bits that are kept beyond those of float32."""


def added_up(products, at_once, bits):
    """The sum as blocks of products are added, each term cut off below the largest one's bits."""
    total = 0.0
    for first in range(0, len(products), at_once):
        terms = [total, *products[first : first + at_once]]
        largest = max(abs(term) for term in terms)
        quantum = 2.0 ** (math.frexp(largest)[1] - 24 - bits) if largest else 1.0
        total = sum(math.trunc(term / quantum) for term in terms) * quantum
        if total:
            unit = 2.0 ** (math.frexp(abs(total))[1] - 24)  # float32, rounded down
            total = math.trunc(total / unit) * unit
    return total


def nasty(dim, at_once, bits):
    """One large product, and all others just below what is kept beside it."""
    return [1.0] + [2.0 ** -(23 + bits) * (1 - 2.0**-9)] * (dim - 1)


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("dim", [16, 32, 64, 128, 512])
def test_sums_are_within_the_tolerance(monkeypatch, generation, dim):
    at_once, bits = GENERATIONS[generation]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (generation, 0))
    turn = turn_error(torch.device("cuda", 0))
    draw = random.Random(dim)
    cases = [nasty(dim, at_once, bits)]
    cases += [
        [draw.gauss(0, 1) * 2.0 ** draw.randint(-30, 0) for _ in range(dim)] for _ in range(99)
    ]
    for products in cases:
        off = abs(added_up(products, at_once, bits) - math.fsum(products))
        # The norms' product is at least the sum of the magnitudes (Cauchy and Schwarz).
        assert off <= tolerances(dim, turn)["ONE"] * math.fsum(map(abs, products))


def test_another_generation_is_treated_as_the_worst():
    cpu = turn_error(torch.device("cpu"))
    assert cpu == 2.0**-21 and tolerances(64, cpu)["THREE"] > tolerances(32, cpu)["THREE"]
