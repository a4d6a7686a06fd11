"""K-means and the clustering step against plain loops, and their failure modes."""

import copy

import pytest
import torch
import torchrec
from hypothesis import given, settings
from hypothesis import strategies as st
from torchrec import KeyedJaggedTensor
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from cce_torchrec import CCEEmbeddingBagCollection, CCEEmbeddingBagConfig
from cce_torchrec.clustering import ClusteringSchedule, cluster
from cce_torchrec.codes import widen
from cce_torchrec.hashing import helper_hash
from cce_torchrec.kmeans.lloyd import assign, kmeans
from cce_torchrec.kmeans.pairs import pair_points


def points(num_ids=500, k=7, k_helper=11, dim=4, seed=0, main=None, helper=None):
    g = torch.Generator().manual_seed(seed)
    main = torch.randn(k, dim, generator=g) if main is None else main
    helper = torch.randn(k_helper, dim, generator=g) if helper is None else helper
    a = torch.randint(0, len(main), (num_ids,), generator=g)
    b = torch.randint(0, len(helper), (num_ids,), generator=g)
    return pair_points(main, helper, a, b, torch.randperm(num_ids, generator=g)), main[a] + helper[
        b
    ]


def lloyd_reference(vectors, centroids, iterations):
    """Lloyd's algorithm in float64, a loop over clusters; no empty clusters allowed."""
    vectors, centroids = vectors.double(), centroids.double()
    for _ in range(iterations):
        nearest = torch.cdist(vectors, centroids).argmin(1)
        for c in range(len(centroids)):
            assert (nearest == c).any()
            centroids[c] = vectors[nearest == c].mean(0)
    return centroids, torch.cdist(vectors, centroids).min(1).values.square().sum()


@pytest.mark.parametrize("seed", range(5))
def test_kmeans_equals_plain_lloyd_over_all_ids(seed):
    pairs, vectors = points(seed=seed)
    start = pairs.first.argsort()[:5]
    initial = pairs.vectors(0, pairs.num_pairs)[start]
    result = kmeans(pairs, 5, iterations=6)
    centroids, objective = lloyd_reference(vectors, initial, 6)
    torch.testing.assert_close(result.centroids, centroids.float(), rtol=1e-5, atol=1e-5)
    assert result.objective[-1] == pytest.approx(float(objective), rel=1e-5)
    assert result.empty_clusters == 0


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    num_ids=st.integers(1, 200),
    k=st.integers(1, 40),
    scale=st.sampled_from([1e-20, 1e-3, 1.0, 1e6]),
    duplicates=st.booleans(),
)
def test_kmeans_invariants(seed, num_ids, k, scale, duplicates):
    g = torch.Generator().manual_seed(seed)
    main = torch.randn(6, 4, generator=g) * scale
    helper = torch.zeros(9, 4) if duplicates else torch.randn(9, 4, generator=g) * scale
    pairs, vectors = points(num_ids, seed=seed, main=main, helper=helper)
    result = kmeans(pairs, k, iterations=4)
    assert torch.isfinite(result.centroids).all()
    assert result.assignment.shape == (pairs.num_pairs,)
    assert result.assignment.min() >= 0 and result.assignment.max() < k
    assert int(pairs.counts.sum()) == num_ids
    reached = result.centroids[result.assignment[pairs.pair_of_id]]
    exact = float((vectors.double() - reached.double()).square().sum())
    assert result.objective[-1] == pytest.approx(exact, rel=1e-3, abs=1e-9 * scale**2 * num_ids)
    if k >= pairs.num_pairs and not duplicates:
        # Scores cancel in float32, so a pair may sit on a centroid as near as rounding.
        assert result.objective[-1] <= 1e-5 * float(vectors.double().square().sum())


def test_all_points_equal():
    pairs, _ = points(main=torch.ones(3, 4), helper=torch.zeros(2, 4))
    result = kmeans(pairs, 5)
    assert result.objective[-1] == 0
    assert torch.isfinite(result.centroids).all()


def test_empty_clusters_are_refilled():
    """Half of the starts are copies of one point; without refilling they would stay unused."""
    main = torch.cat(
        [torch.zeros(8, 4), torch.randn(8, 4, generator=torch.Generator().manual_seed(0))]
    )
    pairs, _ = points(2000, main=main, helper=torch.zeros(1, 4))
    keys = torch.where(pairs.main_rows < 8, pairs.first - 10_000, pairs.first)
    pairs = type(pairs)(**{**vars(pairs), "first": keys})
    result = kmeans(pairs, 9, iterations=12)
    assert result.objective[-1] < 0.05 * result.objective[0]


def test_bad_input():
    with pytest.raises(ValueError, match="not finite"):
        points(main=torch.tensor([[float("nan")] * 4]))
    pairs, _ = points()
    with pytest.raises(ValueError, match="num_clusters 0"):
        kmeans(pairs, 0)


def module(**kwargs):
    torch.manual_seed(0)
    config = CCEEmbeddingBagConfig(
        **{
            **dict(name="t", num_embeddings=400, embedding_dim=16, feature_names=["f"], num_rows=8),
            **kwargs,
        }
    )
    return CCEEmbeddingBagCollection(tables=[config])


def embeddings(m):
    n = m.embedding_bag_configs()[0].num_embeddings
    kjt = KeyedJaggedTensor(
        keys=["f"], values=torch.arange(n), lengths=torch.ones(n, dtype=torch.long)
    )
    return m(kjt).values().detach()


def test_step_follows_the_definition():
    m = module()
    before = embeddings(m)
    report = cluster(m)
    codes = m.codes["t"]
    assert codes.rounds == 1 and len(report.chunks) == 4
    for j, chunk in enumerate(report.chunks):
        weight = m.embedding_bag_collection.embedding_bags[f"t#{j}"].weight.detach()
        main, helper = weight[:8], weight[8:]
        old = before[:, 4 * j : 4 * j + 4]
        rows = widen(codes.codes[:, j])
        # Codes are nearest centroids of the old embeddings.
        distances = torch.cdist(old.double(), main.double()).square()
        best = distances.min(1).values
        torch.testing.assert_close(distances[range(400), rows], best, rtol=1e-4, atol=1e-9)
        assert chunk.objective_after == pytest.approx(float(best.sum()), rel=1e-4)
        # Helper rows are mean residuals under the new hash.
        hashed = helper_hash(0, "t", j, 1)(torch.arange(400), 24)
        for row in range(24):
            members = hashed == row
            expected = (old - main[rows])[members].mean(0) if members.any() else torch.zeros(4)
            torch.testing.assert_close(helper[row], expected, rtol=1e-4, atol=1e-6)


def test_optimizer_state_helper_zero_and_main_averaged():
    m = module()
    parameters = list(m.parameters())
    apply_optimizer_in_backward(torchrec.optim.RowWiseAdagrad, parameters, {"lr": 0.1})
    kjt = KeyedJaggedTensor(
        keys=["f"], values=torch.arange(400), lengths=torch.ones(400, dtype=torch.long)
    )
    m(kjt).values().square().sum().backward()
    weight = m.embedding_bag_collection.embedding_bags["t#1"].weight
    state = weight._in_backward_optimizers[0].state[weight]["sum"]
    old, old_codes = state.clone().view(-1), widen(m.codes["t"].codes[:, 1])
    cluster(m)
    new_codes = widen(m.codes["t"].codes[:, 1])
    assert (state.view(-1)[8:] == 0).all()
    for row in range(8):
        members = new_codes == row
        if members.any():
            torch.testing.assert_close(state.view(-1)[row], old[old_codes[members]].mean())


def test_adam_state_through_a_dense_optimizer():
    m = module()
    optimizer = torch.optim.Adam(m.parameters())
    kjt = KeyedJaggedTensor(
        keys=["f"], values=torch.arange(400), lengths=torch.ones(400, dtype=torch.long)
    )
    m(kjt).values().square().sum().backward()
    optimizer.step()
    weight = m.embedding_bag_collection.embedding_bags["t#0"].weight
    old_second = optimizer.state[weight]["exp_avg_sq"].clone()
    cluster(m, optimizer=optimizer)
    state = optimizer.state[weight]
    assert (state["exp_avg"] == 0).all()
    torch.testing.assert_close(
        state["exp_avg_sq"][8:], old_second[8:].mean(0).expand(24, -1).clone()
    )
    assert state["step"] == 1


def test_failed_step_leaves_everything_as_it_was():
    m = module()
    with torch.no_grad():
        m.embedding_bag_collection.embedding_bags["t#2"].weight[3, 1] = float("inf")
    before = copy.deepcopy(m.state_dict())
    with pytest.raises(ValueError, match=r"table 't', chunk 2: .*not finite"):
        cluster(m)
    after = m.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_tables_that_do_not_cluster_are_left_alone():
    for m in (module(num_helper_rows=0), module(num_helper_rows=0, learned_codes=False)):
        before = embeddings(m)
        assert cluster(m).chunks == []
        assert torch.equal(before, embeddings(m))


def test_clustering_needs_less_error_than_hashing():
    """Ids in 8 latent groups: a step recovers what the initial hash mixes up."""
    m = module(num_embeddings=2000, num_rows=8)
    report = cluster(m)
    assert all(c.objective_after < c.objective_before for c in report.chunks)


def test_schedules():
    evenly = ClusteringSchedule.evenly(1000, 18)
    assert len(evenly.steps) == 18 and max(evenly.steps) == 900 and evenly.due(50)
    assert not any(ClusteringSchedule.never().due(step) for step in range(1, 100))
    assert [s for s in range(1, 31) if ClusteringSchedule.every(10).due(s)] == [10, 20, 30]
    assert sorted(ClusteringSchedule.at_epochs([1, 3], 5).steps) == [5, 15]
    assert ClusteringSchedule.evenly(3, 18).steps == {1, 2, 3}
    for bad in (
        lambda: ClusteringSchedule.every(0),
        lambda: ClusteringSchedule.evenly(0),
        lambda: ClusteringSchedule.at_epochs([0], 5),
    ):
        with pytest.raises(ValueError, match=r"step|epoch"):
            bad()


def test_assignment_ties_go_to_the_lowest_index():
    pairs, _ = points()
    centroid = torch.zeros(3, 4)
    assert (assign(pairs, centroid)[0] == 0).all()
