"""What the parts on tables are computed with: runs that are watched, halves, and harms."""

import pytest
import torch

from benchmarks.alignment import embedding_clusterings as clusterings
from benchmarks.alignment import embedding_halves as halves
from benchmarks.alignment import embedding_harm as harm
from benchmarks.alignment import embedding_watch as table_watch
from benchmarks.alignment.embedding_measures import over_runs


def test_figures_over_halves_are_means_of_their_pairs_and_intervals_shrink_with_the_noise():
    values = {(a, b): 0.9 if (b - a) % 2 == 0 else 0.2 for a, b in halves.PAIRS}
    assert halves.over_halves(values) == [0.9, 0, 0.2, 0, 0.7, 0]
    g = torch.Generator().manual_seed(0)
    noisy = {pair: v + 0.1 * float(torch.randn((), generator=g)) for pair, v in values.items()}
    same, half, *_ = halves.over_halves(noisy)
    assert abs(same - 0.9) < half < 0.5


def test_intervals_over_runs_hold_the_truth_about_as_often_as_they_say():
    g, held = torch.Generator().manual_seed(0), 0
    for _ in range(400):
        runs = torch.randn(halves.RUNS, generator=g)  # a value of a pair is that of its runs
        found = halves.over_halves({(a, b): float(runs[a] + runs[b]) for a, b in halves.PAIRS})
        held += abs(found[2]) <= found[3]
    assert 0.93 <= held / 400 <= 1


def test_expected_harm_is_the_mean_of_the_observed_one_over_labels_of_the_models_chances():
    g = torch.Generator().manual_seed(0)
    before, after = (torch.randn(100_000, generator=g) for _ in range(2))
    labels = (torch.rand(100_000, generator=g) < before.sigmoid()).float()
    observed, expected = harm.harms(before, after, labels)
    assert (expected >= 0).all()
    assert float(observed.mean()) == pytest.approx(float(expected.mean()), abs=0.01)


def test_reliability_is_that_of_means_of_ids():
    g = torch.Generator().manual_seed(0)
    ids = torch.arange(2000).repeat_interleave(8)
    own = torch.randn(2000, generator=g).double()[ids]
    noise = torch.randn(len(ids), generator=g).double()
    order = torch.randperm(len(ids), generator=g)
    for scale in (0.0, 2.0):
        found = harm.reliability((own + scale * noise)[order], ids[order], torch.arange(2000))
        # Of a mean of 8: the variance of ids over the whole one.
        assert found == pytest.approx(1 / (1 + scale**2 / 8), abs=0.03)
    assert abs(harm.reliability(noise, ids, torch.arange(2000))) < 0.1


def test_codes_agree_fully_with_renumbered_ones_and_not_with_others():
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(16, (2, 3000), generator=g)
    others = torch.randint(16, (2, 3000), generator=g)
    renumbered = torch.randperm(16, generator=g)[codes]
    assert clusterings.agreement_of_codes([codes, renumbered]) == [1.0]
    assert abs(clusterings.agreement_of_codes([codes, others])[0]) < 0.02


def test_the_first_clusterings_and_the_last_are_watched():
    assert table_watch.watched([10, 20, 30]) == {10: 1, 20: 2, 30: 3}
    assert table_watch.watched(list(range(10, 410, 10))) == {
        10: 1, 20: 2, 40: 4, 80: 8, 160: 16, 400: 40,
    }  # fmt: skip


def test_a_change_is_taken_pair_by_pair():
    pairs = [0.1, 0.5, 0.3, 0.2, 0.4, 0.6]
    times = {"before 1": pairs, "after 1": [value + 0.25 for value in pairs]}
    record = {"runs": 4, "times": {k: {"cka": {"user": v}} for k, v in times.items()}}
    mean, half = clusterings.change(record, ("before 1", "after 1"), "cka", "user")
    assert mean == pytest.approx(0.25) and half < 1e-9 < over_runs(pairs, 4)[1]
