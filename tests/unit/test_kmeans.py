"""K-means over tensors and pairs: against a plain Lloyd loop, on nasty data, by every backend."""

import math
import types
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cce_torchrec import compiled
from cce_torchrec.kmeans import PairPoints, TensorPoints, kmeans, native
from cce_torchrec.kmeans.backends import make_backend, optional_module
from cce_torchrec.kmeans.lloyd import refill_empty
from cce_torchrec.kmeans.points import BLOCK, metric_root
from tests.support.optional import installed, needs

CPU = torch.device("cpu")
ENGINES = [
    "auto",
    "torch",
    *(["native"] if native.available() else []),
    pytest.param("faiss", marks=needs("faiss")),
]


def pairs(num_ids=500, k=7, k_helper=11, dim=4, seed=0, main=None, helper=None):
    """Points of ids with random codes and hashes, and every id's vector."""
    g = torch.Generator().manual_seed(seed)
    main = torch.randn(k, dim, generator=g) if main is None else main
    helper = torch.randn(k_helper, dim, generator=g) if helper is None else helper
    a = torch.randint(0, len(main), (num_ids,), generator=g)
    b = torch.randint(0, len(helper), (num_ids,), generator=g)
    keys, inverse, counts = torch.unique(
        a * len(helper) + b, return_inverse=True, return_counts=True
    )
    starts = torch.randperm(len(keys), generator=g)
    points = PairPoints(
        main,
        helper,
        a=(keys // len(helper)).int(),
        b=(keys % len(helper)).int(),
        weights=counts,
        starts=starts,
    )
    return points, main[a] + helper[b], inverse


def lloyd_reference(vectors, centroids, iterations):
    """Lloyd's algorithm in float64, a loop over clusters; no empty clusters allowed."""
    vectors, centroids = vectors.double(), centroids.double()
    for _ in range(iterations):
        nearest = torch.cdist(vectors, centroids).argmin(1)
        for c in range(len(centroids)):
            assert (nearest == c).any()
            centroids[c] = vectors[nearest == c].mean(0)
    return centroids, float(torch.cdist(vectors, centroids).min(1).values.square().sum())


@pytest.mark.parametrize("backend", ENGINES)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dim", [4, 12])
def test_pairs_equal_plain_lloyd_over_all_ids(backend, seed, dim):
    points, vectors, _ = pairs(seed=seed, dim=dim)
    initial = points.vectors(points.starts(5))
    result = kmeans(points, 5, 6, backend=backend)
    centroids, objective = lloyd_reference(vectors, initial, 6)
    torch.testing.assert_close(result.centroids, centroids.float(), rtol=1e-5, atol=1e-5)
    assert result.objective[-1] == pytest.approx(objective, rel=1e-5)
    assert result.empty_clusters == 0 and int(result.sizes.sum()) == 500


@pytest.mark.parametrize("backend", [*ENGINES, pytest.param("sklearn", marks=needs("sklearn"))])
def test_tensor_equals_plain_lloyd(backend):
    x = torch.randn(400, 5, generator=torch.Generator().manual_seed(0))
    start = x[:9]
    result = kmeans(x, 9, 5, init=start, backend=backend)
    centroids, objective = lloyd_reference(x, start, 5)
    torch.testing.assert_close(result.centroids, centroids.float(), rtol=1e-4, atol=1e-4)
    assert result.objective[-1] == pytest.approx(objective, rel=1e-4)


@pytest.mark.parametrize("backend", ENGINES)
def test_weights_equal_replicated_points(backend):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(60, 8, generator=g)
    weights = torch.randint(0, 4, (60,), generator=g)
    start = x[weights > 0][:4]
    weighted = kmeans(x, 4, 5, weights=weights, init=start, backend=backend)
    replicated = kmeans(x.repeat_interleave(weights, 0), 4, 5, init=start, backend=backend)
    assert torch.equal(weighted.centroids, replicated.centroids)
    assert weighted.objective[-1] == pytest.approx(replicated.objective[-1], rel=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    num_ids=st.integers(1, 200),
    k=st.integers(1, 150),
    scale=st.sampled_from([1e-20, 1e-3, 1.0, 1e6]),
    zero_helper=st.booleans(),
    backend=st.sampled_from(
        [e for e in ENGINES if isinstance(e, str)] + ["faiss"] * installed("faiss")
    ),
)
def test_invariants(seed, num_ids, k, scale, zero_helper, backend):
    g = torch.Generator().manual_seed(seed)
    main = torch.randn(6, 4, generator=g) * scale
    helper = torch.zeros(9, 4) if zero_helper else torch.randn(9, 4, generator=g) * scale
    points, vectors, pair_of_id = pairs(num_ids, seed=seed, main=main, helper=helper)
    result = kmeans(points, k, 4, backend=backend)
    assert torch.isfinite(result.centroids).all()
    assert result.assignment.shape == (points.num_points,)
    assert result.assignment.min() >= 0 and result.assignment.max() < k
    assert torch.equal(
        result.sizes, torch.bincount(result.assignment, points.weights.double(), k).long()
    )
    reached = result.centroids[result.assignment[pair_of_id].long()]
    exact = float((vectors.double() - reached.double()).square().sum())
    norm = float(vectors.double().square().sum())
    assert result.objective[-1] == pytest.approx(exact, rel=1e-3, abs=1e-6 * norm)
    for before, after in zip(result.iterations, result.iterations[1:], strict=False):
        if not before.splits:  # a split perturbs its donor
            assert after.objective <= before.objective * (1 + 1e-5) + 1e-6 * norm
    if k >= points.num_points and not zero_helper:
        # Scores cancel in float32, so a pair may sit on a centroid as near as rounding.
        assert result.objective[-1] <= 1e-5 * norm


@pytest.mark.parametrize("backend", ENGINES)
@pytest.mark.parametrize("scale", [1e-18, 1.0, 1e15])
def test_nasty_data(backend, scale):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(64, 4, generator=g) * scale
    norm = float(x.double().square().sum())
    half = torch.cat([x, x[:1].expand(64, 4)])
    assert kmeans(half, 65, 3, backend=backend).objective[-1] <= 1e-6 * norm  # one point a cluster
    same = kmeans(x[:1].expand(300, 4), 5, backend=backend)  # all points equal
    assert same.objective[-1] <= 1e-6 * norm and same.empty_clusters == 4
    few = kmeans(x[:3], 10, backend=backend)  # fewer points than clusters
    assert few.objective[-1] <= 1e-6 * norm
    assert kmeans(x, 1, backend=backend).objective[-1] == pytest.approx(
        float((x - x.mean(0)).double().square().sum()), rel=1e-5
    )


def test_empty_clusters_are_refilled():
    """Starts that are all one point would leave 15 of 16 clusters empty."""
    x = torch.randn(2000, 4, generator=torch.Generator().manual_seed(0))
    result = kmeans(x, 16, 30, init=x[:1].expand(16, 4))
    good = kmeans(x, 16, 30)
    assert sum(i.splits for i in result.iterations) > 0
    assert result.empty_clusters == 0
    assert result.objective[-1] < 1.1 * good.objective[-1]


def test_refill_takes_the_largest_errors_in_order():
    centroids = torch.tensor([[1.0, 2.0], [4.0, 8.0], [0.0, 0.0], [0.0, 0.0]])
    out, splits = refill_empty(centroids, torch.tensor([5, 5, 0, 0]), torch.tensor([1, 9, 0, 0]), 0)
    up, down = 1 + 1 / 1024, 1 - 1 / 1024
    expected = [[down, 2 * up], [4 * down, 8 * up], [4 * up, 8 * down], [up, 2 * down]]
    assert splits == 2 and torch.equal(out, torch.tensor(expected))


def test_refill_splits_no_cluster_whose_error_is_rounding():
    """A large cluster on its centroid may have more of it than a small one has error."""
    centroids, sizes = torch.tensor([[1.0, 2.0], [4.0, 8.0], [0.0, 0.0]]), torch.tensor([90, 5, 0])
    out, splits = refill_empty(centroids, sizes, torch.tensor([80, 9, 0]), rounding=sizes)
    assert splits == 1 and torch.equal(out[0], centroids[0])
    assert torch.equal(out[2], torch.tensor([4 * (1 + 1 / 1024), 8 * (1 - 1 / 1024)]))


@pytest.mark.parametrize("backend", ENGINES)
def test_results_do_not_depend_on_the_cut(backend):
    """Points beyond one block get the centroid they would get alone, bit for bit."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(BLOCK + 777, 16, generator=g)
    centroids = torch.randn(70, 16, generator=g)
    points = TensorPoints(x)
    nearest = make_backend(backend, CPU).prepare(points, centroids)
    whole = nearest(0, points.num_points)
    assert torch.equal(whole[BLOCK:], nearest(BLOCK, points.num_points))
    assert torch.equal(whole[:BLOCK], nearest(0, BLOCK))


@pytest.mark.skipif(not native.available(), reason="the compiled kernels were not built")
def test_one_backend_for_several_problems():
    """It keeps tables of scores for the points and the number of centroids of the last call."""
    g, engine = torch.Generator().manual_seed(0), make_backend("native", CPU)
    made = [pairs(5000, 20, 30, 8, seed=seed)[0] for seed in (0, 1)]
    for seed, k in ((0, 16), (1, 16), (1, 40), (0, 16)):
        points, centroids = made[seed], torch.randn(k, 8, generator=g)
        assert engine._pair_scorer(points, k) is not None
        nearest = engine.prepare(points, centroids)(0, points.num_points)
        assert torch.equal(
            nearest, native.PointScorer(centroids).of_vectors(points.vectors(slice(None)))
        )


@pytest.mark.parametrize("k", [1, 15, 16, 17, 33, 112, 113, 127, 128, 129, 300, 2100])
@pytest.mark.parametrize("dim", [3, 4, 8, 16])
@pytest.mark.skipif(not native.available(), reason="the compiled kernels were not built")
def test_compiled_kernels_find_the_nearest(k, dim):
    points, _, _ = pairs(5000, 60, 90, dim, seed=k)
    g = torch.Generator().manual_seed(k)
    centroids = torch.randn(k, dim, generator=g)
    x = points.vectors(slice(None))
    main, helper = points.codebooks()
    scorer = native.PairScorer(main, helper, len(centroids))
    scorer.score(centroids)
    by_pair = scorer.nearest(points.a, points.b)
    direct = native.PointScorer(centroids)
    by_point = direct.of_vectors(x)
    assert torch.equal(by_point, direct.of_sums(points.sources(), points.scale))
    assert torch.equal(by_point[4::5], direct.of_vectors(x[4::5]))  # wherever a point stands
    best = torch.cdist(x.double(), centroids.double()).min(1).values
    for got in (by_pair, by_point):
        mine = (x.double() - centroids[got.long()].double()).norm(dim=1)
        torch.testing.assert_close(mine, best, rtol=1e-5, atol=1e-5)


def test_a_library_of_older_sources_is_not_used(monkeypatch):
    monkeypatch.setattr(compiled.ctypes, "CDLL", lambda file: types.SimpleNamespace())
    folder = Path(native.__file__).parent
    assert compiled.library.__wrapped__(folder, ("cce_nearest_sums",)) is None


@pytest.mark.parametrize("backend", ENGINES)
def test_ties_go_to_the_lowest_index(backend):
    points, _, _ = pairs(dim=12)
    for k in (3, 200, 2100):
        nearest = make_backend(backend, CPU).prepare(points, torch.zeros(k, 12))
        assert (nearest(0, points.num_points) == 0).all()


def test_early_stop_and_statistics():
    x = torch.randn(3000, 4, generator=torch.Generator().manual_seed(0))
    result = kmeans(x, 3, 500)
    assert len(result.iterations) < 400  # no sum changed any more
    loose = kmeans(x, 3, 500, tolerance=0.01)
    assert len(loose.iterations) < len(result.iterations)
    for iteration in result.iterations:
        assert iteration.seconds > 0 and iteration.imbalance >= 1
        assert math.isfinite(iteration.objective)


def test_plus_plus_starts_lower_than_random():
    g = torch.Generator().manual_seed(0)
    x = (torch.randn(40, 1, 4, generator=g) * 10 + torch.randn(40, 50, 4, generator=g)).view(-1, 4)
    random, spread = kmeans(x, 40, 1), kmeans(x, 40, 1, init="k-means++")
    assert spread.objective[0] < random.objective[0]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x: kmeans(x, 0), "num_clusters 0"),
        (lambda x: kmeans(x, 3, 0), "iterations 0"),
        (lambda x: kmeans(x[:0], 3), "non-empty"),
        (lambda x: kmeans(x.long(), 3), "float matrix"),
        (lambda x: kmeans(x * float("nan"), 3), "not finite"),
        (lambda x: kmeans(x / 0, 3), "not finite"),
        (lambda x: kmeans(x * 1e20, 3), r"reach 1e\+20"),
        (lambda x: kmeans(x, 3, init=x[:3] * 1e20), "starting centroids must be finite, at most"),
        (lambda x: kmeans(x, 3, backend="spark"), "unknown K-means backend"),
        (lambda x: kmeans(x, 3, init="zeros"), "unknown init"),
        (lambda x: kmeans(x, 3, init=x[:2]), r"starting centroids .* \[3, 4\]"),
        (lambda x: kmeans(x, 3, weights=torch.ones(3)), "weights must be integers"),
        (lambda x: kmeans(x, 3, weights=-torch.ones(9).long()), "at least 0"),
        (lambda x: kmeans(x, 3, weights=torch.full((9,), 2**31)), "divide them"),
        (lambda x: kmeans(TensorPoints(x), 3, weights=torch.ones(9).long()), "have their own"),
        pytest.param(
            lambda x: kmeans(x, 30, backend="sklearn"),
            "at least as many points",
            marks=needs("sklearn"),
        ),
        (lambda x: pairs(main=x * float("inf")), "not finite"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.ones(9, 4))


def test_missing_dependency_says_how_to_install_it():
    with pytest.raises(ValueError, match=r"pip install 'cce-torchrec\[faiss\]'"):
        optional_module("no_such_faiss", "faiss")


@pytest.mark.parametrize("as_pairs", [True, False])
def test_metric_equals_kmeans_of_transformed_points(as_pairs):
    """Distances by A are Euclidean ones after the root of A; centroids stay in the old space."""
    g = torch.Generator().manual_seed(3)
    half = torch.randn(4, 4, generator=g)
    metric = half @ half.t()
    root = metric_root(metric, 4)
    torch.testing.assert_close(root @ root.t(), metric, rtol=1e-4, atol=1e-5)
    points, vectors, inverse = pairs(300)
    if not as_pairs:
        points, inverse = TensorPoints(vectors), torch.arange(300)
    start = vectors[:6]
    result = kmeans(points, 6, 4, init=start, metric=metric)
    plain = kmeans(vectors @ root, 6, 4, init=start @ root)
    assert result.objective == pytest.approx(plain.objective, rel=1e-4)
    for c in range(6):
        own = vectors[result.assignment[inverse] == c]
        torch.testing.assert_close(result.centroids[c], own.mean(0), rtol=1e-4, atol=1e-5)
    assert not torch.equal(result.assignment, kmeans(points, 6, 4, init=start).assignment)
    for bad in (-metric, half, torch.eye(5)):
        with pytest.raises(ValueError, match="metric must be"):
            kmeans(points, 6, metric=bad)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_the_largest_weights_are_exact(backend):
    """Weights that sum to 2^33: integer sums must not wrap."""
    x = torch.tensor([[1.0, -1, 3, 2], [1, -1, 3, 2], [5, 4, -7, 0], [5, 4, -7, 0]])
    result = kmeans(x, 2, 3, weights=torch.full((4,), 2**31), init=x[1:3] + 0.1, backend=backend)
    torch.testing.assert_close(result.centroids, x[1:3])
    assert result.sizes.tolist() == [2**32, 2**32]
