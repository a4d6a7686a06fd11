"""The benchmark of alignment between tables: its data, its runs, and its statistics."""

from unittest import mock

import numpy as np
import pytest
import scipy.stats
import torch

from benchmarks.alignment import embedding_compressible as compressible
from benchmarks.alignment import embedding_runs, embedding_sharing, embedding_tables
from benchmarks.alignment.embedding_measures import by_frequency, cka, of_pairs, over_runs
from benchmarks.alignment.embedding_runs import Data, TableRun, counts_of, trained
from benchmarks.alignment.embedding_sharing import (
    agreements,
    losses,
    partial_correlation,
    rank_correlation,
)
from benchmarks.quality import training
from benchmarks.quality.cells import Cell, Group
from benchmarks.quality.problems import PROBLEMS, Problem
from cce_torchrec.alignment import neighbourhoods
from cce_torchrec.metrics import log_loss
from tests.support.quality import SIZES, tiny_dataset

TINY = Problem(
    name="tiny", load=tiny_dataset, model="dlrm", dim=16, batch=32, passes=(2,),
    budgets=("bytes=12000",), splits=(0,),
)  # fmt: skip


def cell(dataset, method, budget, seed):
    group = Group(dataset, 2, method, "1.1", budget)
    form = "4 chunks" if method.startswith("CCE") else ""
    return Cell(group, 0, seed, "adagrad", 0.1, form)


@pytest.fixture(autouse=True)
def tiny():
    with (
        mock.patch.dict(PROBLEMS, {"tiny": TINY}),
        mock.patch.object(embedding_tables, "cell_of", cell),
        mock.patch.object(embedding_sharing, "cell_of", cell),
    ):
        yield
    training.dataset_of.cache_clear()


def test_runs_have_the_data_that_were_asked_for():
    whole = tiny_dataset(0)
    half = [Data(share=0.5).of(whole, run).train for run in range(2)]
    assert len(half[0]) == 224 and torch.equal(half[0].ids, half[1].ids)
    parts = [Data(halves=True).of(whole, run).train for run in range(3)]
    assert torch.equal(parts[0].dense, parts[2].dense)
    every = torch.cat([parts[0].dense, parts[1].dense])
    assert len(torch.unique(every[:, 0])) == len(torch.unique(whole.train.dense[:, 0])) == 448
    noisy = [Data(flipped=0.25).of(whole, run).train for run in range(2)]
    turned = [one.labels != whole.train.labels for one in noisy]
    assert all(60 < int(one.sum()) < 170 for one in turned) and not torch.equal(*turned)
    assert Data(flipped=0.25).of(whole, 0).validation is whole.validation


@pytest.mark.parametrize("method", ["full", "hash", "CCE, frequent recipe"])
def test_a_run_has_the_vectors_of_its_lowest_loss(method):
    run = trained(cell("tiny", method, "none" if method == "full" else "bytes=12000", 0), Data(), 0)
    assert {name: tuple(own.shape) for name, own in run.vectors.items()} == {
        name: (size, 16) for name, size in SIZES.items()
    }
    lowest = min(point[1] for point in run.curve)
    assert float(losses(run, run.vectors).mean()) == pytest.approx(lowest, rel=1e-4)
    assert run.read_vectors()["a"].shape == (300, 16)


def test_losses_are_those_of_the_vectors_that_are_given():
    run = trained(cell("tiny", "full", "none", 0), Data(), 0)
    moved = {**run.vectors, "a": torch.zeros_like(run.vectors["a"])}
    rows = run.dataset.validation
    weight = torch.cat([moved[name] for name in SIZES])
    ids = run.ids_of(rows)
    with torch.no_grad():
        others = run.other_tables.lookup(ids[:, 2:], False)
        logits = run.network(rows.dense, torch.cat([weight[ids[:, :2]], others], dim=1))
    expected = log_loss(logits, rows.labels)
    assert float(losses(run, moved).mean()) == pytest.approx(expected, rel=1e-5)


def test_a_rate_is_looked_up_and_must_be_chosen():
    own = embedding_runs.cell_of("ml-1m", "full", "none", 3)
    assert (own.split, own.seed) == (0, 3) and own.rate > 0
    with pytest.raises(ValueError, match="no rate is chosen for"):
        embedding_runs.cell_of("tiny", "full", "none", 3)


def test_tables_of_runs_are_compared():
    found = embedding_tables.TablesCell("tiny", "full", "none", Data(), 3).measure()
    counts = counts_of("tiny", Data())
    assert found["tables"]["a"]["seen"] == int((counts["a"] > 0).sum())
    assert len(found["tables"]["a"]["cka"]) == 3 and len(found["log_loss"]) == 3
    assert embedding_tables.plain(found)
    text = "\n".join(embedding_tables.PART.lines([{**found, "on": "ml-1m"}]))
    assert "| ml-1m | full | none |" in text
    noisy = embedding_tables.TablesCell("tiny", "full", "none", Data(flipped=0.01), 3).measure()
    # One seed, and labels that are nearly the same: nearly the same tables.
    assert min(noisy["tables"]["b"]["cka"]) > max(found["tables"]["b"]["cka"])


def test_sharing_has_a_loss_for_every_table():
    found = embedding_sharing.SharingCell("tiny", Data()).measure()
    assert set(found["tables"]) == set(SIZES)
    assert all(len(table["increase"]) == 3 for table in found["tables"].values())
    text = "\n".join(embedding_sharing.PART.lines([found]))
    assert "| tiny | 100% | 0% | a |" in text


def test_few_ids_and_constant_vectors_have_no_alignment():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(200, 8, generator=g)
    assert cka(x, x) == pytest.approx(1) and cka(x[:40], x[:40]) is None
    assert cka(x, torch.ones(200, 8)) is None
    runs = [{"t": x}, {"t": x}, {"t": torch.randn(200, 8, generator=g)}]
    same, *others = of_pairs(runs, "t", torch.arange(200), cka)
    assert same == pytest.approx(1) and max(others) < 0.2
    counts = torch.arange(200)
    starts = [row[:2] for row in by_frequency(runs, "t", counts)]
    assert starts == [[64, 136]]  # of fewer ids there is no bin


def test_intervals_over_runs_are_those_of_a_jackknife():
    values = {(0, 1): 0.1, (0, 2): 0.3, (1, 2): 0.8}
    mean, half = over_runs(list(values.values()), 3)
    without = np.array([0.8, 0.3, 0.1])
    assert mean == pytest.approx(0.4)
    variance = 2 / 3 * ((without - without.mean()) ** 2).sum()
    assert half == pytest.approx(scipy.stats.t.ppf(0.975, 2) * variance**0.5, rel=1e-3)


def test_rank_correlations_are_scipys():
    g = np.random.default_rng(0)
    z = g.integers(0, 9, 300).astype(float)
    x, y = z + g.normal(size=300), z + g.integers(0, 4, 300)
    assert rank_correlation(x, y) == pytest.approx(scipy.stats.spearmanr(x, y).statistic)
    matrix = np.linalg.inv(scipy.stats.spearmanr(np.stack([x, y, z], axis=1)).statistic)
    expected = -matrix[0, 1] / (matrix[0, 0] * matrix[1, 1]) ** 0.5
    assert partial_correlation(x, y, [z]) == pytest.approx(expected)
    assert abs(expected) < 0.2  # z is all that they have in common
    assert np.isnan(rank_correlation(x, np.ones(300))) and np.isnan(rank_correlation(x[:5], y[:5]))


def test_agreement_of_an_id_is_its_share_of_neighbours():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(300, 4, generator=g)
    y = x + 0.3 * torch.randn(300, 4, generator=g)
    found = agreements(x, y)
    assert float(found.mean()) == pytest.approx(neighbourhoods(x, y, 10).overlap.value, abs=1e-6)


def test_a_run_is_what_it_is_without_being_watched():
    own = cell("tiny", "full", "none", 1)
    plain, watched = training.Run(own), TableRun(own, Data(), 0)
    plain.train()
    watched.train()
    assert plain.curve == watched.curve


def test_what_compressing_costs_is_ranked_by_what_full_tables_agree_on():
    def record(method, share, loss, value):
        table = {"cka": [value, None], "neighbours": [0.1], "examples": 100 * share, "bins": []}
        return {
            "on": "ml-1m", "method": method, "share": share, "flipped": 0.0, "log_loss": [loss],
            "budget": "none" if method == "full" else "bytes=104000", "tables": {"t": table},
        }  # fmt: skip

    records = []
    for number in range(7):
        share = (number + 1) / 10
        records += [record("full", share, 0.5, share), record("ours", share, 0.5 + share**2, 0)]
    found = compressible.points(records, embedding_tables.MIDDLE)
    assert [on for on, _ in found] == ["ml-1m"] * 7
    assert found[1][1]["increase"] == pytest.approx(0.04) and found[1][1]["cka"] == 0.2
    text = compressible.lines_of(records, embedding_tables.MIDDLE)[-2]
    assert text.startswith("| ml-1m | 7 | +0.0100 to +0.4900 | +1.00 (p = 0.00")
