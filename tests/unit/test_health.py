"""The health of tables, their damage and their differences, of tensors and small checkpoints."""

import math
import random
from unittest import mock

import numpy as np
import pytest
import torch

from cce_torchrec.checkpoint import code_matching, health_parts
from cce_torchrec.checkpoint.code_matching import Contingency
from cce_torchrec.checkpoint.distributions import BINS, count_histogram, distribution
from cce_torchrec.checkpoint.health import chunk_health, model_health
from cce_torchrec.checkpoint.health_warnings import share_in_words, warnings_of
from tests.support.health import assert_chunk, in_bins, plain_chunk
from tests.support.jobs import build, step


@pytest.mark.parametrize(("ids", "rows", "helper_rows"), [(1, 1, 0), (40, 3, 9), (500, 90, 270)])
def test_a_chunk_in_memory_is_as_loops_count_it(ids, rows, helper_rows):
    g = torch.Generator().manual_seed(ids)
    codes = torch.randint(0, rows, (ids,), generator=g) // 2  # so that some have no id
    main = torch.randn(rows, 4, generator=g)
    main[0] = 0
    helper = torch.randn(helper_rows, 4, generator=g) if helper_rows else None
    hashed = torch.randint(0, helper_rows, (ids,), generator=g) if helper_rows else None
    found = chunk_health(codes, main, helper, hashed, chunk=3)
    lists = ([], []) if helper is None else (hashed.tolist(), helper.tolist())
    assert_chunk(found, plain_chunk(codes.tolist(), lists[0], main.tolist(), lists[1]))
    assert found["chunk"] == 3


def test_values_that_are_not_finite_are_counted_and_left_out():
    main = torch.ones(4, 4)
    main[1, 2], main[3, 0], main[3, 1] = math.nan, math.inf, -math.inf
    found = chunk_health(torch.arange(4), main)["main"]
    assert found["not_finite"] == 3
    assert found["norms"]["quantiles"] == dict.fromkeys(found["norms"]["quantiles"], 2.0)
    assert found["norms"]["counts"] == [2]
    nothing = distribution(np.array([math.nan]))
    assert nothing["mean"] is None and nothing["counts"] == []


def test_histograms_hold_every_value_once():
    values = np.random.default_rng(0).lognormal(0, 2, 5000)
    found = distribution(values)
    assert len(found["counts"]) == BINS and sum(found["counts"]) == 5000
    counts = np.array([0, 0, 1, 1, 5, 70, 1234, 100_000_000])
    found = count_histogram(counts)
    assert found["counts"] == in_bins(counts.tolist(), found["edges"])
    assert found["edges"][:3] == [0, 1, 2] and len(found["counts"]) <= 64
    assert count_histogram(np.array([], np.int64)) == {"edges": [], "counts": []}


def test_of_very_many_rows_every_mth_is_looked_at():
    """The same ones wherever blocks begin."""
    rows = torch.randn(1000, 3, generator=torch.Generator().manual_seed(0))
    with mock.patch.object(health_parts, "SAMPLE", 100):
        for cuts in ([1000], [7, 400, 1, 592]):
            sums = health_parts.RowSums((1000, 3))
            for first, part in zip(np.cumsum([0, *cuts]), rows.split(cuts), strict=False):
                sums.add((int(first), 0), part, squares=True)
            assert sums.stride == 10
            np.testing.assert_array_equal(sums.total(), rows[::10].double().square().sum(1))


def test_columns_of_two_ranks_are_added_up_and_copies_are_not():
    rows = torch.randn(6, 4)
    left, right, copied = (health_parts.RowSums((6, 4)) for _ in range(3))
    left.add((0, 0), rows[:, :1], squares=False)
    right.add((0, 1), rows[:, 1:], squares=False)
    copied.add((0, 1), rows[:, 1:], squares=False)
    left.merge(right)
    left.merge(copied)
    np.testing.assert_allclose(left.total(), rows.double().abs().sum(1))


def test_rows_that_were_never_trained_are_told():
    model, own = build("unsharded", 1)
    step(model, own, 0)
    plain = next(t for t in model_health(model, [own])["tables"] if t["kind"] == "plain")
    sums = next(s["sum"] for p, s in _states(model.collection) if "embedding_bags.p." in p).view(-1)
    assert 0 < plain["untouched"] == round(float((sums == 0).float().mean()), 6)


def _states(collection):
    for name, parameter in collection.named_parameters():
        for optimizer in parameter._in_backward_optimizers:
            yield name, optimizer.state[parameter]


def test_sgd_keeps_nothing_by_which_rows_are_known_to_be_untouched():
    model, own = build("unsharded", 1, optimizer="sgd")
    step(model, own, 0)
    plain = next(t for t in model_health(model, [own])["tables"] if t["kind"] == "plain")
    assert plain["untouched"] is None
    assert plain["optimizer"] == {"kind": "SGD", "bytes": 0, "state": {}}


@pytest.mark.parametrize(
    ("share", "words"),
    [(0.1, "a tenth"), (0.25, "a quarter"), (0.5, "half"), (0.9, "nine tenths"),
     (0.98, "nearly all"), (1, "all")],
)  # fmt: skip
def test_shares_are_said_in_words(share, words):
    assert share_in_words(share) == words


def chunk(number, empty=0, dead=0, imbalance=1.0, **rows):
    main = {"rows": 8, "looked_at": 8, "zero": 0, "not_finite": 0} | rows
    return {"chunk": number, "empty_codes": empty, "dead_helper_rows": dead,
            "imbalance": imbalance, "main": main}  # fmt: skip


def test_warnings_are_sentences_that_name_the_chunks():
    table = {"kind": "CCE", "num_rows": 8, "num_helper_rows": 24, "clusterings": 1}
    assert warnings_of(table | {"chunks": [chunk(0), chunk(1)]}) == []
    chunks = [
        chunk(0, empty=2), chunk(1, empty=2, dead=24), chunk(2, empty=4, imbalance=5.0),
        chunk(3, zero=8), chunk(4, not_finite=1),
    ]  # fmt: skip
    assert warnings_of(table | {"chunks": chunks}) == [
        "a quarter of the main rows of chunks 0 and 1 have no id",
        "half of the main rows of chunk 2 have no id",
        "all of the helper rows of chunk 1 have no id",
        "the ids of chunk 2 are spread unevenly over the codes (imbalance over 4, where 1 is even)",
        "rows of chunk 4 have values that are NaN or infinite",
        "all main rows of chunk 3 are zero, after a clustering",
    ]
    # Main rows of the recipe "rare" are zero until the first clustering.
    assert warnings_of(table | {"clusterings": 0, "chunks": [chunk(0, zero=8)]}) == []


def test_warnings_of_a_plain_table():
    rows = {"rows": 10, "looked_at": 10, "zero": 2, "not_finite": 3}
    assert warnings_of({"kind": "plain", "rows": rows, "untouched": 0.75}) == [
        "3 values are NaN or infinite",
        "a fifth of the rows are zero",
        "three quarters of the rows were never trained: what the optimizer has added up of them is "
        "0",
    ]


def greedy(before, after):
    """Share of ids outside the pairs that a loop takes, one after the other."""
    pairs = {}
    for pair in zip(before, after, strict=True):
        pairs[pair] = pairs.get(pair, 0) + 1
    rows, columns, matched = set(), set(), 0
    for (row, column), count in sorted(pairs.items(), key=lambda item: (-item[1], item[0])):
        if row not in rows and column not in columns:
            matched += count
            rows.add(row)
            columns.add(column)
    return 1 - matched / len(before)


@pytest.mark.parametrize("dense", [True, False])
def test_changed_codes_are_counted_as_a_loop_counts_them(dense):
    draw = random.Random(0)
    for sides in ((1, 1), (5, 5), (20, 80), (80, 20)):
        before = [draw.randrange(sides[0]) for _ in range(700)]
        # Half of the ids go where their cluster went, the others anywhere.
        after = [b % sides[1] if draw.random() < 0.5 else draw.randrange(sides[1]) for b in before]
        with mock.patch.object(code_matching, "_DENSE", 1 << 22 if dense else 0):
            found = Contingency(*sides)
            for first in range(0, 700, 99):
                part = slice(first, first + 99)
                found.add(np.array(before[part]), np.array(after[part]))
            assert math.isclose(found.changed(), greedy(before, after), abs_tol=1e-12)


def test_renumbered_clusters_have_changed_nothing():
    codes, order = np.arange(1000) % 37, np.random.default_rng(0).permutation(37)
    found = Contingency(37, 37)
    found.add(codes, order[codes])
    assert found.changed() == 0
    assert Contingency(3, 3).changed() == 0


def test_the_default_device_does_not_matter():
    """Meta stands for a GPU, whose memory numpy cannot read either."""
    model, own = build("unsharded", 1)
    step(model, own, 0)
    expected = model_health(model, [own])
    with torch.device("meta"):
        assert model_health(model, [own]) == expected
