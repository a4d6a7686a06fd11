"""Two tables that are in memory, all measures at once, and intervals."""

import math

import numpy as np
import pytest
import torch

from cce_torchrec.alignment.interval import jackknife, jackknife_of_means
from cce_torchrec.alignment.linear import debiased_cka, linear_cka, mean_cca, svcca
from cce_torchrec.alignment.moments import grouped_moments, moments
from cce_torchrec.alignment.tables import Weight, align


def pair(n, seed=0, dims=(6, 4)):
    g = torch.Generator().manual_seed(seed)
    common = torch.randn(n, 3, generator=g)
    return [common @ torch.randn(3, d, generator=g) + torch.randn(n, d, generator=g) for d in dims]


def test_all_measures_are_those_of_all_ids():
    x, y = pair(700)
    found = align(Weight(x), Weight(y), k=3, sample=50)
    whole = moments([(x.double(), y.double())])
    for name, measure in (("linear_cka", linear_cka), ("debiased_cka", debiased_cka),
                          ("mean_cca", mean_cca), ("svcca", svcca)):  # fmt: skip
        own = getattr(found, name)
        assert own.value == pytest.approx(measure(whole), rel=1e-4)
        assert own.low < own.value < own.high
    assert found.neighbours.ids <= 50 and found.codes is None


def test_counts_weigh_ids():
    x, y = pair(300)
    counts = torch.arange(300) % 3
    found = align(Weight(x), Weight(y), counts=counts)
    assert found.debiased_cka is None
    copies = [part.repeat_interleave(counts, 0).double() for part in (x, y)]
    assert found.linear_cka.value == pytest.approx(linear_cka(moments([tuple(copies)])), rel=1e-4)


def test_intervals_hold_what_all_ids_have():
    """In 95 % of samples of ids; of 200 samples, in 95 % of cases, at least 183."""
    x, y = (part.double() for part in pair(200_000))
    expected = debiased_cka(moments([(x, y)]))
    held = 0
    for seed in range(200):
        at = torch.randint(0, len(x), (640,), generator=torch.Generator().manual_seed(seed))
        blocks = zip(x[at].split(20), y[at].split(20), strict=True)
        own = jackknife(debiased_cka, grouped_moments(blocks, 32))
        held += own.low <= expected <= own.high
    assert held >= 183


def test_intervals_of_means_are_those_of_students():
    values = np.random.default_rng(0).normal(size=50)
    found = jackknife_of_means(values.tolist(), 2.0)
    error = 1.96 * values.std(ddof=1) / math.sqrt(50)
    assert found.value == pytest.approx(2 * values.mean())
    assert found.high - found.value == pytest.approx(2 * error)


def test_other_numbers_of_ids_are_refused_and_the_common_ones_offered():
    x, y = pair(300)
    with pytest.raises(ValueError, match=r"300 and 200 ids; with common=True .* first 200"):
        align(Weight(x), Weight(y[:200]))
    both = align(Weight(x), Weight(y[:200]), common=True)
    assert both == align(Weight(x[:200]), Weight(y[:200]))


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (torch.ones(5), r"counts of shape \(5,\) are given of 300 ids"),
        (torch.ones(300, 1), r"counts of shape \(300, 1\)"),
        (torch.zeros(300), "not all 0"),
        (-torch.ones(300), "of 0 or more"),
        (torch.full((300,), math.nan), "finite"),
    ],
)
def test_counts_of_other_ids_are_refused(counts, message):
    x, y = pair(300)
    with pytest.raises(ValueError, match=message):
        align(Weight(x), Weight(y), counts=counts)


def test_some_ids_stand_for_all():
    x, y = pair(5000)
    counts = torch.arange(5000) % 7
    whole = align(Weight(x), Weight(y), sample=50)
    some = align(Weight(x), Weight(y), max_ids=1000, sample=50)
    assert 900 < some.ids <= 1000 and some.neighbours == whole.neighbours
    assert some.linear_cka.low < whole.linear_cka.value < some.linear_cka.high
    assert align(Weight(x), Weight(y), max_ids=5000, sample=50) == whole
    weighed = align(Weight(x), Weight(y), counts=counts, max_ids=1000, sample=50)
    again = align(Weight(x), Weight(y), counts=counts, sample=50)
    assert weighed.linear_cka.value == pytest.approx(again.linear_cka.value, abs=0.05)
    with pytest.raises(ValueError, match="max_ids=1 leaves nothing"):
        align(Weight(x), Weight(y), max_ids=1)


def test_half_precision_is_added_up_in_more():
    x, y = pair(300)
    half = align(Weight(x.bfloat16()), Weight(y.half()))
    exact = align(Weight(x.bfloat16().float()), Weight(y.half().float()))
    assert half == exact


@pytest.mark.parametrize("weight", [torch.ones(4), torch.ones(4, 2, dtype=torch.int64)])
def test_what_is_no_table_is_refused(weight):
    with pytest.raises(ValueError, match=r"a table is \[ids, dimension\] of floating point"):
        Weight(weight)


@pytest.mark.parametrize("ids", [2, 3, 9, 40])
def test_few_ids_do(ids):
    x, y = pair(ids)
    found = align(Weight(x), Weight(y))
    assert 0 <= found.linear_cka.value <= 1 + 1e-6
    assert (found.neighbours is None) == (ids < 12)
    assert (found.linear_cka.low is None) == (ids < 32)
    assert (found.mean_cca is None) == (found.svcca is None) == (ids <= 6)  # dimensions


class Coded(Weight):
    """A table with codes by the size of the first value."""

    num_chunks, num_rows = 1, 4

    def codes(self, first, last):
        return (self.weight[first:last, :1] > 0).long() * 3


def test_ids_are_compared_by_name():
    x, y = pair(300)
    g = torch.Generator().manual_seed(1)
    order = torch.randperm(300, generator=g)
    names = [f"item {i}" for i in range(300)]
    kept = order[:250]
    counts = torch.arange(300) % 4
    other = Coded(y[kept])
    found = align(
        Coded(x), other, names=(names, [names[i] for i in kept]), counts=counts, k=3, sample=90
    )
    at = kept.sort().values
    expected = align(Coded(x[at]), Coded(y[at]), counts=counts[at], k=3, sample=90)
    assert found.ids == 250
    for name in ("linear_cka", "mean_cca", "procrustes_distance"):
        assert getattr(found, name).value == pytest.approx(getattr(expected, name).value, rel=1e-5)
    assert found.neighbours == expected.neighbours and found.codes == expected.codes


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((range(300), range(299)), r"the second table has 300 ids, and names of \(299,\)"),
        (([0, *range(299)], range(300)), "a name of the first table is that of several"),
        ((range(300), range(299, 599)), "the tables have 1 in common"),
    ],
)
def test_names_that_do_not_fit(names, message):
    x, y = pair(300)
    with pytest.raises(ValueError, match=message):
        align(Weight(x), Weight(y), names=names)
