"""Sums of optimizer state against exact fractions, in any order."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cce_torchrec.clustering.exact_sums import weighted_sums
from cce_torchrec.kmeans.points import MAX_WEIGHT

K = 5


def sums_of(values, rows, weights, clusters, num_clusters):
    return weighted_sums(
        values, rows=rows, weights=weights, clusters=clusters, num_clusters=num_clusters
    )


def problem(seed, spread, dim, points=400, rows=37, total=1 << 20):
    """Values over `spread` powers of ten, and points with weights of about `total` in all."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, dim, generator=generator).double().abs()
    values *= 10.0 ** -(spread * torch.rand(rows, dim, generator=generator).double())
    values = values.float().double()
    row = torch.randint(rows, (points,), generator=generator).int()
    weights = torch.randint(max(1, 2 * total // points), (points,), generator=generator)
    clusters = torch.randint(K - 1, (points,), generator=generator).int()  # the last one is empty
    return values, row, weights, clusters


def fractions(values, rows, weights, clusters):
    out = [[Fraction(0)] * values.shape[1] for _ in range(K)]
    each = zip(rows.tolist(), weights.tolist(), clusters.tolist(), strict=True)
    exact = [[Fraction(v) for v in row] for row in values.tolist()]
    for row, weight, cluster in each:
        for j, value in enumerate(exact[row]):
            out[cluster][j] += weight * value
    return out


@settings(deadline=None, max_examples=30)
@given(
    st.integers(0, 1 << 20),
    st.sampled_from([0, 6, 18]),
    st.sampled_from([1, 3]),
    st.sampled_from([1 << 20, MAX_WEIGHT // 3]),
)
def test_sums_are_those_of_fractions_in_any_order(seed, spread, dim, total):
    values, *points = problem(seed, spread, dim, total=total)
    found = sums_of(values, *points, K)
    for sums, exact in zip(found.tolist(), fractions(values, *points), strict=True):
        for value, fraction in zip(sums, exact, strict=True):
            assert abs(Fraction(value) - fraction) <= fraction / 2**48
    order = torch.randperm(len(points[0]), generator=torch.Generator().manual_seed(seed + 1))
    again = sums_of(values, *(part[order] for part in points), K)
    assert torch.equal(found.view(torch.int64), again.view(torch.int64))


def test_what_is_a_quintillionth_of_the_largest_keeps_its_float32():
    values = torch.tensor([[1e18], [4 / 3]]).float().double()
    at = torch.tensor([0, 1])
    found = sums_of(values, at, torch.tensor([1, 7]), at, 2)
    assert (found[:, 0] / torch.tensor([1, 7])).float().tolist() == values[:, 0].float().tolist()


def test_floats_depend_on_the_order_and_these_do_not():
    """Why it is done: a cluster's sum in two orders."""
    values = torch.tensor([[1e16], [1.0], [-1e16]]).double()
    at, ones, other = torch.tensor([0, 1, 2]), torch.ones(3).long(), torch.tensor([0, 2, 1])
    assert float(values[at].cumsum(0)[-1]) != float(values[other].cumsum(0)[-1])
    for order in (at, other):
        assert float(sums_of(values, order, ones, 0 * at, 1)) == 1.0


@pytest.mark.parametrize("scale", [0.0, 2.0**-149, 1e-38, 3e38, 1e300, 1e-270, -1.0])
def test_scales(scale):
    values = torch.tensor([[1.0, 0.5], [0.0, 0.25]]).double() * scale
    at = torch.tensor([0, 1, 1])
    found = sums_of(values, at, torch.tensor([3, 5, 0]), at, 3)
    assert found[0].tolist() == (3 * values[0]).tolist()
    assert found[1].tolist() == (5 * values[1]).tolist()
    assert found[2].tolist() == [0.0, 0.0]
    assert all(math.isfinite(v) for v in found.flatten().tolist())


def test_the_largest_weights_do_not_overflow():
    values = torch.tensor([[1 - 2.0**-53]]).double()
    many = torch.full((4,), MAX_WEIGHT // 4)
    found = sums_of(values, 0 * many, many, 0 * many, 1)
    assert float(found) == pytest.approx(MAX_WEIGHT, rel=1e-15)


def test_no_points():
    none = torch.zeros(0, dtype=torch.int64)
    assert sums_of(torch.ones(2, 3).double(), none, none, none, 2).tolist() == [[0.0] * 3] * 2
