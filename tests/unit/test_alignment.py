"""Measures of alignment against their definitions, on few ids, and against other libraries."""

import math

import numpy as np
import pytest
import torch

from cce_torchrec.alignment.agreement import CodeCounts, adjusted_mutual_information
from cce_torchrec.alignment.linear import (
    debiased_cka,
    linear_cka,
    mean_cca,
    procrustes_distance,
    svcca,
)
from cce_torchrec.alignment.moments import Moments, moments
from cce_torchrec.alignment.neighbours import neighbourhoods
from tests.support.optional import needs

MEASURES = [linear_cka, debiased_cka, procrustes_distance, mean_cca, svcca]


def pair(n=60, p=5, q=7, shared=0.7, seed=0):
    """Two tables [n, p] and [n, q] that have `shared` of their variance in common."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    common = normal(n, 3)
    x, y = (shared * common @ normal(3, d) + (1 - shared) * normal(n, d) for d in (p, q))
    return x * torch.linspace(0.1, 2, p, dtype=torch.float64), y


def sums(x, y, *weights, size=17):
    parts = (x, y, *weights)
    return moments(zip(*(part.split(size) for part in parts), strict=True))


def centred(x, weights=None):
    w = torch.ones(len(x), 1, dtype=x.dtype) if weights is None else weights[:, None]
    return (x - (w * x).sum(0) / w.sum()) * w.sqrt()


def cka_by_kernels(x, y, unbiased):
    """From matrices of ids by ids, as Kornblith et al. and Song et al. write it."""
    n = len(x)
    k, m = x @ x.T, y @ y.T
    if not unbiased:
        h = torch.eye(n, dtype=x.dtype) - 1 / n

        def hsic(a, b):
            return (h @ a @ h * b).sum()
    else:
        k, m = (a - a.diag().diag() for a in (k, m))
        one = torch.ones(n, dtype=x.dtype)

        def hsic(a, b):
            rest = (one @ a @ one) * (one @ b @ one) / ((n - 1) * (n - 2))
            return (a * b).sum() + rest - 2 / (n - 2) * (one @ a @ b @ one)

    return float(hsic(k, m) / (hsic(k, k) * hsic(m, m)).sqrt())


def whitened(x, kept):
    left, values, _ = torch.linalg.svd(centred(x), full_matrices=False)
    share = values.square().cumsum(0) / values.square().sum()
    return left[:, : int((share < kept - 1e-12).sum()) + 1]


def cca_by_bases(x, y, kept):
    a, b = whitened(x, kept), whitened(y, kept)
    return float(torch.linalg.svdvals(a.T @ b).sum() / min(a.shape[1], b.shape[1]))


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("shape", [(60, 5, 7), (8, 3, 3), (300, 1, 16)])
def test_sums_give_what_the_definitions_do(shape, offset):
    x, y = pair(*shape)
    found = sums(x + offset, y - offset)  # which the definitions would lose digits by
    assert linear_cka(found) == pytest.approx(cka_by_kernels(x, y, False), rel=1e-6)
    assert debiased_cka(found) == pytest.approx(cka_by_kernels(x, y, True), rel=1e-5)
    assert mean_cca(found) == pytest.approx(cca_by_bases(x, y, 1.0), rel=1e-6)
    assert svcca(found, 0.9) == pytest.approx(cca_by_bases(x, y, 0.9), rel=1e-6)


@needs("scipy")
def test_procrustes_is_scipys():
    from scipy.spatial import procrustes

    x, y = pair(q=5)
    # Theirs scales one table once more, which leaves 1 - s^2 of 2 - 2 s.
    _, _, disparity = procrustes(x.numpy(), y.numpy())
    distance = procrustes_distance(sums(x, y))
    assert 1 - (1 - distance**2 / 2) ** 2 == pytest.approx(disparity, rel=1e-9)


@pytest.mark.parametrize("measure", MEASURES)
def test_what_no_measure_looks_at(measure):
    """A rotation, a shift and a scale, and where blocks begin."""
    x, y = pair()
    expected = measure(sums(x, y))
    turn = torch.linalg.qr(torch.randn(7, 7, dtype=torch.float64)).Q
    moved = 3.5 * y @ turn + torch.arange(7)
    assert measure(sums(x, moved, size=60)) == pytest.approx(expected, rel=1e-9)
    same = measure(sums(x, 2 * x @ torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q))
    assert same == pytest.approx(0 if measure is procrustes_distance else 1, abs=1e-7)


def test_cca_looks_at_no_linear_map_and_cka_does():
    x, y = pair()
    turned = y @ torch.randn(7, 7, dtype=torch.float64)
    assert mean_cca(sums(x, turned)) == pytest.approx(mean_cca(sums(x, y)), rel=1e-9)
    assert linear_cka(sums(x, turned)) != pytest.approx(linear_cka(sums(x, y)), rel=1e-2)


def test_under_independence_debiased_cka_is_none_and_the_plain_one_is_not():
    plain, debiased = [], []
    for seed in range(200):
        g = torch.Generator().manual_seed(seed)
        x, y = (torch.randn(40, 20, generator=g, dtype=torch.float64) for _ in range(2))
        found = sums(x, y)
        plain.append(linear_cka(found)), debiased.append(debiased_cka(found))
    error = np.std(debiased) / math.sqrt(len(debiased))
    assert abs(np.mean(debiased)) < 4 * error < 0.01
    assert min(plain) > 0.2


@pytest.mark.parametrize("measure", [linear_cka, procrustes_distance, mean_cca, svcca])
def test_a_weight_is_a_number_of_copies(measure):
    x, y = pair()
    weights = torch.randint(0, 4, (len(x),), generator=torch.Generator().manual_seed(1))
    copies = [part.repeat_interleave(weights, 0) for part in (x, y)]
    assert measure(sums(x, y, weights)) == pytest.approx(measure(sums(*copies)), rel=1e-9)


def test_single_precision_is_enough_for_its_tables():
    x, y = (part + 3 for part in pair(4000))
    exact = linear_cka(sums(x, y))
    assert linear_cka(sums(x.float(), y.float(), size=1000)) == pytest.approx(exact, rel=1e-5)


def test_sums_of_parts_add_up():
    x, y = pair()
    parts = [Moments.of(x[at], y[at]) for at in (slice(0, 20), slice(20, 60))]
    both, whole = parts[0] + parts[1], Moments.of(x, y)
    for name, value in vars(whole).items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(getattr(both, name), value, rtol=1e-12, atol=1e-12)
    assert both.ids == 60


def ranks_by_loops(x, y, k):
    """Overlap and imbalances by sorting, of tables without ties."""
    n = len(x)
    near = [torch.cdist(t, t).fill_diagonal_(math.inf).argsort(1) for t in (x, y)]
    overlap = sum(len({*near[0][i, :k].tolist()} & {*near[1][i, :k].tolist()}) for i in range(n))

    def imbalance(a, b):
        rank = b.argsort(1)[:, :] + 1
        return 2 / n * float(rank.gather(1, a[:, :k]).double().mean())

    return overlap / (n * k), imbalance(*near), imbalance(*near[::-1])


def values(found):
    return found.overlap.value, found.imbalance.value, found.imbalance_back.value


@pytest.mark.parametrize("k", [1, 4])
def test_neighbours_are_those_of_loops(k):
    x, y = pair(50)
    found = neighbourhoods(x, y, k)
    expected = ranks_by_loops(x, y, k)
    assert values(found) == pytest.approx(expected)
    same = neighbourhoods(x, 3 * x + 1, k)
    assert same.overlap.value == 1 and same.imbalance.value == pytest.approx((k + 1) / len(x))


@needs("sklearn")
def test_neighbours_are_those_of_scikit_learn():
    from sklearn.neighbors import NearestNeighbors

    x, y = pair(300)
    near = [
        NearestNeighbors(n_neighbors=10).fit(t).kneighbors(return_distance=False)
        for t in (x.numpy(), y.numpy())
    ]
    shared = [len(set(a) & set(b)) for a, b in zip(*near, strict=True)]
    assert neighbourhoods(x, y).overlap.value == pytest.approx(np.mean(shared) / 10)


def test_ties_count_as_the_mean_over_their_orders():
    """Rows that ids share: every order of equals is as good."""
    x, y = pair(24, p=2, q=2)
    x, y = x[torch.arange(24) % 8], y[torch.arange(24) // 4]
    found = neighbourhoods(x, y, 5)
    drawn = []
    for seed in range(400):
        noise = torch.rand(2, 24, 2, generator=torch.Generator().manual_seed(seed)).double() * 1e-6
        drawn.append(ranks_by_loops(x + noise[0], y + noise[1], 5))
    means, errors = np.mean(drawn, 0), np.std(drawn, 0) / math.sqrt(len(drawn))
    ours = np.array(values(found))
    assert (np.abs(ours - means) < 5 * errors + 1e-9).all(), (ours, means, errors)


def test_independent_tables_share_the_neighbours_of_chance():
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(1500, 4, generator=g) for _ in range(2))
    found = neighbourhoods(x, y, 10)
    assert found.overlap.value == pytest.approx(10 / 1499, rel=0.3)
    assert found.imbalance.value == pytest.approx(1, rel=0.05)


@needs("sklearn")
@pytest.mark.parametrize(("n", "rows"), [(5, (3, 2)), (500, (7, 20)), (3000, (300, 256))])
@pytest.mark.parametrize("related", [False, True])
def test_agreement_of_codes_is_scikit_learns(n, rows, related):
    from sklearn.metrics import adjusted_mutual_info_score

    g = torch.Generator().manual_seed(n)
    a = torch.randint(0, rows[0], (n,), generator=g)
    b = torch.randint(0, rows[1], (n,), generator=g)
    if related:
        b = torch.where(torch.rand(n, generator=g) < 0.8, (a * 7) % rows[1], b)
    counts = CodeCounts(rows)
    for part in zip(a.split(97), b.split(97), strict=True):
        counts.add(*part)
    expected = adjusted_mutual_info_score(a.numpy(), b.numpy())
    assert adjusted_mutual_information(counts) == pytest.approx(expected, rel=1e-9, abs=1e-10)


def test_agreement_looks_at_no_names():
    a = torch.arange(60) % 6
    counts = CodeCounts((6, 6))
    counts.add(a, torch.tensor([3, 0, 5, 1, 4, 2])[a])
    assert adjusted_mutual_information(counts) == pytest.approx(1)
    counts = CodeCounts((1, 1))
    counts.add(torch.zeros(4).long(), torch.zeros(4).long())
    assert adjusted_mutual_information(counts) == 1


X, Y = pair()
NAN = X.clone()
NAN[3, 1] = math.nan


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: moments([(X, Y[:50])]), "of 60 and of 50 ids"),
        (lambda: sums(NAN, Y), "values that are not finite"),
        (lambda: moments([]), "two ids or more, and there are none"),
        (lambda: sums(X[:1], Y[:1]), "two ids or more, and there is one"),
        (lambda: linear_cka(sums(X, torch.ones_like(Y))), "all ids of the second table"),
        (lambda: linear_cka(sums(torch.full_like(X, 1e8), Y)), "all ids of the first table"),
        (lambda: debiased_cka(sums(X, Y, torch.ones(60))), "leave the weights out"),
        (lambda: debiased_cka(moments([(X, Y)], norms=False)), "leave out norms=False"),
        (lambda: debiased_cka(sums(X[:3], Y[:3])), "four ids or more, and there are 3"),
        (lambda: svcca(sums(X, Y), 1.5), "kept=1.5 is no part"),
        (lambda: neighbourhoods(X, Y, 59), "60 ids have no 59 neighbours"),
        (lambda: neighbourhoods(X, Y[:50]), "of 60 and of 50 ids"),
        (lambda: neighbourhoods(NAN, Y), "the first table has values that are not finite"),
        (lambda: neighbourhoods(X, torch.ones_like(Y)), "all ids of the second table"),
        (lambda: CodeCounts((3, 2)).add(torch.tensor([3]), torch.tensor([0])), "reach from 3 to 3"),
        (lambda: CodeCounts((3, 2)).add(torch.zeros(2), torch.zeros(1)), "of 2 and of 1 ids"),
        (lambda: adjusted_mutual_information(CodeCounts((2, 2))), "there are none"),
    ],
)
def test_what_has_no_answer_is_refused(call, said):
    with pytest.raises(ValueError, match=said):
        call()


@pytest.mark.parametrize(
    ("k", "forth", "back", "overlap"),
    [(1, 0.3581, 0.48375, 0.055), (5, 0.42448, 0.52, 0.144), (20, 0.5092825, 0.55754, 0.31775)],
)
def test_the_library_of_the_measures_authors_agrees(k, forth, back, overlap):
    """Values by dadapy 0.3.4, which wants a numpy below 2 and so an environment of its own.

    `_return_imbalance` of `MetricComparisons.dist_indices`, and `return_data_overlap`.
    """
    r = np.random.RandomState(0)
    x = r.normal(size=(200, 4))
    y = np.concatenate([x[:, :2] + 0.3 * r.normal(size=(200, 2)), r.normal(size=(200, 1))], axis=1)
    found = neighbourhoods(torch.from_numpy(x), torch.from_numpy(y), k)
    assert found.imbalance.value == pytest.approx(forth, rel=1e-12)
    assert found.imbalance_back.value == pytest.approx(back, rel=1e-12)
    assert found.overlap.value == pytest.approx(overlap, rel=1e-12)
