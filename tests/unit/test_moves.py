"""Moved ids of a clustering step, against a loop over pairs of codes; evenness and dead rows."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from cce_torchrec import CCEEmbeddingBagCollection, CCEEmbeddingBagConfig
from cce_torchrec.clustering import cluster, finalize, moves
from cce_torchrec.clustering.moves import Moves
from cce_torchrec.codes.chunk_codes import ChunkCodes
from cce_torchrec.codes.hashing import mix
from cce_torchrec.kmeans.points import PairPoints

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def same_numbers():
    """Each time, so that k-means++ finds heaps of points that it would find nearly always."""
    torch.manual_seed(0)


def reference(old, new):
    """Share of ids whose new cluster is not what their old one became: pair by pair, most first."""
    counts = {}
    for pair in zip(old, new, strict=True):
        counts[pair] = counts.get(pair, 0) + 1
    columns = max(new) + 1
    tie = {pair: int(mix(torch.tensor(pair[0] * columns + pair[1]))) for pair in counts}
    became, kept = {}, 0
    for a, b in sorted(counts, key=lambda pair: (-counts[pair], tie[pair])):
        if a not in became and b not in became.values():
            became[a] = b
            kept += counts[a, b]
    return 1 - kept / len(old)


def measured(old, new, k, k_new):
    """The same by `Moves`, from one point for each pair of codes."""
    pairs, counts = torch.unique(torch.stack([old, new]), dim=1, return_counts=True)
    own = Moves(k, k_new, num_ids=len(old), levels=1, device=CPU)
    rows = torch.zeros(k, 4, dtype=torch.int32)
    a, none = pairs[0].int(), torch.zeros(0, dtype=torch.int64)
    points = PairPoints.from_integers(rows, rows, 1.0, a, a, counts, none)
    own.add_points(points, pairs[1], counts)
    return own


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize(("k", "k_new", "ids"), [(7, 7, 300), (5, 20, 1000), (40, 40, 60)])
def test_moved_ids_are_those_of_a_loop_over_pairs(k, k_new, ids, dense):
    old = torch.randint(k, (ids,))
    new = torch.where(torch.rand(ids) < 0.5, old, torch.randint(k_new, (ids,)))
    new[0] = k_new - 1  # so that the loop knows how many there are
    with mock.patch.object(moves, "_DENSE", 1 << 19 if dense else 0):
        own = measured(old, new, k, k_new)
    assert own.moved() == pytest.approx(reference(old.tolist(), new.tolist()), abs=1e-12)
    sizes = torch.bincount(new, minlength=k_new)
    assert own.empty == int((sizes == 0).sum())
    assert own.imbalance == pytest.approx(k_new * float((sizes**2).sum()) / ids**2)


def test_renumbered_clusters_have_not_moved():
    old = torch.randint(30, (5000,))
    own = measured(old, torch.randperm(30)[old], 30, 30)
    assert own.moved() == 0.0


def one_table(num_rows=16, **options):
    config = CCEEmbeddingBagConfig(
        name="t", num_embeddings=3000, embedding_dim=8, num_chunks=2, num_rows=num_rows,
        num_helper_rows=48, feature_names=["t"], **options,
    )  # fmt: skip
    collection = CCEEmbeddingBagCollection([config])
    for bag in collection.embedding_bags.values():
        torch.nn.init.normal_(bag.weight)
    return collection


def codes_of(collection):
    own = collection.codes["t"]
    assert isinstance(own, ChunkCodes)
    return own


WAYS = {
    "pairs": {},
    "list": {"samples_per_centroid": 10**6},
    "sample": {"samples_per_centroid": 5},
    "weights": {"weights": {"t": torch.arange(3000) % 3}},
    "weights of a sample": {"weights": {"t": torch.arange(3000) % 3}, "samples_per_centroid": 5},
}


@pytest.mark.parametrize("call", [cluster, finalize])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dense", [True, False])
def test_a_report_counts_codes_as_they_were_and_are(way, call, dense):
    collection = one_table()
    before = codes_of(collection).unpacked.t().tolist()
    with (
        mock.patch.object(moves, "_DENSE", 1 << 19 if dense else 0),
        mock.patch.object(moves, "_SAMPLED", 10**6),
    ):
        report = call(collection, **WAYS[way])
    own = codes_of(collection)
    helper = own.helper_rows(torch.arange(3000)) if call is cluster else None
    for chunk, old in zip(report.chunks, before, strict=True):
        new = own.unpacked[:, chunk.chunk]
        rows = 16 if call is cluster else 64
        sizes = torch.bincount(new, minlength=rows)
        dead = int((sizes == 0).sum())
        if helper is not None:
            dead += int((torch.bincount(helper[chunk.chunk], minlength=48) == 0).sum())
        assert chunk.dead_rows == dead
        assert chunk.imbalance == pytest.approx(rows * float((sizes**2).sum()) / 3000**2)
        # The last cluster has an id, or the loop would not know how many there are.
        assert sizes[-1] > 0
        assert chunk.moved == pytest.approx(reference(old, new.tolist()), abs=1e-12)
        assert chunk.moved <= chunk.changed
    assert report.dead_rows == sum(chunk.dead_rows for chunk in report.chunks)
    assert f"{report.moved:.1%} beyond renumbering" in str(report)


def test_a_sample_of_ids_is_about_right():
    """Where pairs of codes are too many for a table, and K-means saw a sample."""
    collection = one_table(num_rows=4)
    with mock.patch.object(moves, "_DENSE", 0):  # every 11th of 3,000 ids
        report = cluster(collection, samples_per_centroid=20)
    other = one_table(num_rows=4)
    other.load_state_dict(collection.state_dict())
    with mock.patch.object(moves, "_DENSE", 0):
        sampled = cluster(collection, samples_per_centroid=20)
    whole = cluster(other, samples_per_centroid=20)
    for one, all_ids in zip(sampled.chunks, whole.chunks, strict=True):
        # 272 ids: a standard deviation of a share is 3 % at most.
        assert one.moved == pytest.approx(all_ids.moved, abs=0.1)
        assert (one.dead_rows, one.imbalance) == (all_ids.dead_rows, all_ids.imbalance)
    assert report.chunks[0].ids == 3000


def test_a_second_step_from_converged_clusters_moves_few():
    """The points are 3 heaps, which every step finds, in whatever order."""
    collection = one_table(num_rows=3)
    with torch.no_grad():
        for bag in collection.embedding_bags.values():
            bag.weight.mul_(0.001)
            bag.weight[:3] += torch.eye(3, 4) * 10
    cluster(collection, iterations=20, init="k-means++")
    report = cluster(collection, iterations=20, init="k-means++")
    assert all(chunk.moved == 0 for chunk in report.chunks)
    assert report.changed > 0 and report.moved == 0
