"""benchmarks.quality: cells, resumption, tables, data sets, bad input."""

import json
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from benchmarks import recipes
from benchmarks.quality import options, problems, running, training
from benchmarks.quality.budgets import Budget
from benchmarks.quality.cells import TUNING_SPLITS, Cell, Group
from benchmarks.quality.curves import write_curves
from benchmarks.quality.estimate import estimate
from benchmarks.quality.gowalla import gowalla, unvisited
from benchmarks.quality.grid import Selection, chosen, groups, missing, tuning_cells
from benchmarks.quality.methods import METHODS
from benchmarks.quality.power_law import CRITEO_IDS, power_law
from benchmarks.quality.problems import PROBLEMS, Problem, renumbered
from benchmarks.quality.running import remaining
from benchmarks.quality.store import Store
from benchmarks.quality.summary import rows_of, unreproduced
from benchmarks.quality.table import markdown
from benchmarks.quality.training import record_of
from tests.support.quality import SIZES, tiny_dataset

TINY = Problem(
    name="tiny",
    load=tiny_dataset,
    model="dlrm",
    dim=16,
    batch=32,
    passes=(2,),
    budgets=("bytes=12000",),
    splits=(0, 1),
)
GROUP = Group("tiny", 2, "CE", "1.1", "bytes=12000")


@pytest.fixture(autouse=True)
def tiny():
    # Of three tries: what the tests count.
    ce = replace(METHODS["CE"], shares=False)
    with mock.patch.dict(PROBLEMS, {"tiny": TINY}), mock.patch.dict(METHODS, {"CE": ce}):
        yield
    training.dataset_of.cache_clear()


def finished(cell, loss, **more):
    """A record as `record_of` writes it."""
    group = cell.group
    return {
        "key": cell.key,
        "dataset": group.dataset,
        "passes": group.passes,
        "budget": group.budget,
        "method": group.method,
        "version": group.version,
        "split": cell.split,
        "rate": cell.rate,
        "form": cell.form,
        "log_loss": loss,
        "auc": 0.7,
        "table_bytes": 12000,
        "parameters": 3000,
        "training_bytes": 15000,
        "cpu_seconds": 2.0,
        **more,
    }


def test_a_cell_trains_alike_whenever_it_is_run():
    cell = tuning_cells(GROUP, {})[0]
    first, again = record_of(cell), record_of(cell)
    assert first["curve"] == again["curve"]
    assert len(first["curve"]) == 8  # every quarter of two passes
    assert first["log_loss"] == pytest.approx(min(loss for _, loss, _ in first["curve"]), abs=1e-5)
    assert first["steps"] == 28


def test_order_of_batches_and_start_of_the_network_do_not_depend_on_the_method():
    runs = [
        training.Run(
            Cell(Group("tiny", 2, name, "1.1", "bytes=12000"), 0, 0, "rowwise_adagrad", 0.1)
        )
        for name in ("CE", "hash")
    ]
    for one, other in zip(*(run.network.parameters() for run in runs), strict=True):
        assert one.equal(other)
    one, other = (run._order(1) for run in runs)
    assert one.equal(other)


@pytest.mark.parametrize("model", ["dlrm", "gmf"])
def test_recipes_are_compared_on_parts_of_the_data(model, monkeypatch):
    monkeypatch.setitem(PROBLEMS, "tiny", replace(TINY, model=model))
    setting = recipes.Setting("tiny", ("bytes=4000",), 0.5, 1)
    made = []

    class Kept(recipes.ForcedRun):
        def train(self):
            made.append((len(self.dataset.train), self.embedder.made))
            super().train()

    monkeypatch.setattr(recipes, "ForcedRun", Kept)
    for recipe in recipes.RECIPES:
        losses = recipes.measured(setting, "bytes=4000", recipe)
        assert set(losses) == {"0.03", "0.1"} and all(0 < loss < 2 for loss in losses.values())
    shared = "2 tables as one, " if model == "dlrm" else ""
    rows = {how for _, how in made}
    assert {size for size, _ in made} == {224} and f"{shared}1 main row" in rows
    assert len(rows) == 2 and all(how.startswith(shared) for how in rows)


@pytest.mark.parametrize(
    "change",
    [
        {"split": 1},
        {"seed": 1},
        {"rate": 0.3},
        {"optimizer": "adagrad"},
        {"form": "2 chunks"},
        {"group": Group("tiny", 1, "CE", "1.1", "bytes=12000")},
        {"group": Group("tiny", 2, "hash", "1.1", "bytes=12000")},
        {"group": Group("tiny", 2, "CE", "1.2", "bytes=12000")},
        {"group": Group("tiny", 2, "CE", "1.1", "share=0.05")},
        {"group": Group("flights", 2, "CE", "1.1", "bytes=12000")},
    ],
)
def test_whatever_changes_a_result_changes_the_key(change):
    cell = {"group": GROUP, "split": 0, "seed": 0, "optimizer": "rowwise_adagrad", "rate": 0.1}
    assert Cell(**cell).key != Cell(**{**cell, **change}).key


def test_rates_first_then_one_beyond_the_edge_then_the_splits():
    records = {}
    cells = missing(GROUP, records, ())
    assert [cell.rate for cell in cells] == [0.03, 0.1, 0.3]
    assert {cell.split for cell in cells} == {TUNING_SPLITS[0]}
    for cell, loss in zip(cells, (0.5, 0.4, 0.3), strict=True):
        records[cell.key] = finished(cell, loss)
    (beyond,) = missing(GROUP, records, ())
    assert beyond.rate == 0.9 and beyond.split == TUNING_SPLITS[0]
    records[beyond.key] = finished(beyond, 0.35)
    assert not chosen(GROUP, records).at_edge
    finals = missing(GROUP, records, ())
    assert [(cell.split, cell.seed, cell.rate) for cell in finals] == [(0, 0, 0.3), (1, 1, 0.3)]
    records[beyond.key] = finished(beyond, 0.2)
    assert chosen(GROUP, records).at_edge


def test_one_table_for_all_unless_the_network_multiplies_two_embeddings():
    recipe = METHODS["CCE, frequent recipe"]
    forms = {model: [t.form for t in recipe.tries(model, 16)] for model in ("dlrm", "gmf")}
    assert forms["gmf"] == ["4 chunks", "2 chunks"]
    assert [t.form for t in recipe.tries("gmf", 32)] == [*forms["gmf"], "8 chunks"]
    assert forms["dlrm"] == ["shared, 4 chunks", "shared, 2 chunks"]
    for name in ("full", "ours", "low rank", "DHE"):
        assert METHODS[name].tries("dlrm", 16) == METHODS[name].own_tries


ROBE = Group("tiny", 2, "ROBE", "1.2", "bytes=12000")
"""Of two forms, each of three rates."""


@pytest.fixture
def forms_once(monkeypatch):
    """Forms are chosen at 12,000 bytes for all budgets of bytes."""
    tuned = replace(PROBLEMS["tiny"], forms_at=("bytes=12000",))
    monkeypatch.setitem(PROBLEMS, "tiny", tuned)


def tuned_forms(group, **best):
    """Records of the tuning of both forms, with the middle rate the best."""
    return {
        cell.key: finished(cell, best[cell.form[-1]] + abs(cell.rate - 0.1))
        for cell in tuning_cells(group, {})
    }


def test_the_form_is_chosen_once_and_the_rate_at_each_budget(forms_once):
    small, shares = (replace(ROBE, budget=budget) for budget in ("bytes=3000", "share=0.05"))
    assert missing(small, {}, ()) == missing(ROBE, {}, ()) == tuning_cells(ROBE, {})
    assert len(tuning_cells(shares, {})) == 6  # of another kind: both forms
    records = tuned_forms(ROBE, **{"1": 0.3, "4": 0.2})
    rates = missing(small, records, ())
    assert [(cell.group, cell.form, cell.rate) for cell in rates] == [
        (small, "shared, Z=4", rate) for rate in (0.03, 0.1, 0.3)
    ]
    for cell, loss in zip(rates, (0.5, 0.3, 0.2), strict=True):
        records[cell.key] = finished(cell, loss)
    (beyond,) = missing(small, records, ())
    assert (beyond.group, beyond.rate) == (small, 0.9)
    records[beyond.key] = finished(beyond, 0.4)
    assert {(c.group, c.rate) for c in missing(small, records, ())} == {(small, 0.3)}
    assert {(c.group, c.rate) for c in missing(ROBE, records, ())} == {(ROBE, 0.1)}


def test_what_is_missing_counts_the_rates_of_a_form_that_is_not_chosen_yet(forms_once):
    both = [ROBE, replace(ROBE, budget="bytes=3000")]
    assert len(remaining(both, {}, ())) == 6 + 2 + 3 + 2
    assert len(remaining(both, tuned_forms(ROBE, **{"1": 0.3, "4": 0.2}), ())) == 2 + 3 + 2
    one_form = [GROUP, replace(GROUP, budget="bytes=3000")]
    assert len(remaining(one_form, {}, ())) == 2 * (3 + 2)


def test_cells_that_budgets_share_are_computed_once(forms_once, tmp_path):
    pool = mock.Mock()
    pool.submit.side_effect = lambda *_: mock.Mock()
    both = [ROBE, replace(ROBE, budget="bytes=3000")]
    running._submit(pool, {}, Store(tmp_path), both, (), 9)
    assert [call.args[1] for call in pool.submit.call_args_list] == tuning_cells(ROBE, {})


def test_a_rate_is_chosen_by_the_mean_over_the_splits_for_tuning(monkeypatch):
    monkeypatch.setitem(PROBLEMS, "tiny", replace(PROBLEMS["tiny"], tuning_splits=(100, 10)))
    cells = tuning_cells(GROUP, {})
    assert [(cell.rate, cell.split) for cell in cells] == [
        (rate, split) for rate in (0.03, 0.1, 0.3) for split in (100, 10)
    ]
    # By the first split the rate of .03 were best, and by the second that of .3.
    losses = (0.1, 0.6, 0.3, 0.3, 0.6, 0.1)
    records = {c.key: finished(c, loss) for c, loss in zip(cells, losses, strict=True)}
    assert chosen(GROUP, records).cell.rate == 0.1
    del records[cells[3].key]
    assert missing(GROUP, records, ()) == [cells[3]]


def test_a_form_that_does_not_fit_a_budget_gives_way_to_the_next_best(forms_once):
    small = replace(ROBE, budget="bytes=40")
    records = tuned_forms(ROBE, **{"1": 0.3, "4": 0.2})
    for form, reason in (("shared, Z=4", "too small"), ("shared, Z=1", "smaller still")):
        rates = missing(small, records, ())
        assert [cell.form for cell in rates] == [form] * 3
        records |= {cell.key: {"does_not_fit": reason} for cell in rates}
    assert missing(small, records, ()) == []
    (row,) = rows_of([small], records, ())
    assert row.choice is None and row.why_not == "too small"


def test_a_rate_in_the_middle_needs_no_other():
    records = {
        cell.key: finished(cell, loss)
        for cell, loss in zip(tuning_cells(GROUP, {}), (0.5, 0.3, 0.4), strict=True)
    }
    assert {cell.split for cell in missing(GROUP, records, ())} == {0, 1}


def test_a_rate_whose_loss_is_no_number_is_not_chosen():
    records = {
        cell.key: finished(cell, loss)
        for cell, loss in zip(tuning_cells(GROUP, {}), (0.5, 0.3, None), strict=True)
    }
    assert chosen(GROUP, records).cell.rate == 0.1


class InThisProcess:
    """Stands in for the pool of processes, which would not know the tiny data set."""

    def __init__(self, *_, **__):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def shutdown(self, **_):
        pass

    def submit(self, function, cell):
        future = running.Future()
        try:
            future.set_result(function(cell))
        except MemoryError as error:
            future.set_exception(error)
        return future


@pytest.fixture
def in_process():
    with mock.patch.object(running, "ProcessPoolExecutor", InThisProcess):
        yield


def test_an_interrupted_run_goes_on_where_it_was(in_process, tmp_path):
    computed = []

    def fake(cell):
        if len(computed) == 3:
            raise KeyboardInterrupt
        computed.append(cell.key)
        return finished(cell, cell.rate)

    with mock.patch.object(running, "record_of", fake), pytest.raises(KeyboardInterrupt):
        running.run(Store(tmp_path), [GROUP], (), 1)
    assert set(Store(tmp_path).records) == set(computed)
    before = list(computed)
    with mock.patch.object(
        running, "record_of", lambda cell: computed.append(cell.key) or finished(cell, cell.rate)
    ):
        running.run(Store(tmp_path), [GROUP], (), 1)
        assert len(set(computed)) == len(computed) == len(before) + 3
        running.run(Store(tmp_path), [GROUP], (), 1)
    assert len(computed) == len(before) + 3


def test_a_cell_that_fails_is_named_and_those_beside_it_are_kept(in_process, tmp_path, capsys):
    def fake(cell):
        if cell.rate == 0.1:
            raise MemoryError("too large")
        return finished(cell, cell.rate)

    with mock.patch.object(running, "record_of", fake), pytest.raises(MemoryError):
        running.run(Store(tmp_path), [GROUP], (), 3)
    kept = Store(tmp_path).records
    assert {record["split"] for record in kept.values()} == {TUNING_SPLITS[0]}
    assert len(kept) == 2
    assert "failed: tiny|passes=2|bytes=12000|CE|split=100" in capsys.readouterr().err


def test_a_process_that_is_killed_is_told(tmp_path):
    class Killed(InThisProcess):
        def submit(self, function, cell):
            future = running.Future()
            future.set_exception(running.BrokenProcessPool("terminated abruptly"))
            return future

    told = pytest.raises(ValueError, match=r"ended from outside \(tiny\|.*fewer --jobs")
    with mock.patch.object(running, "ProcessPoolExecutor", Killed), told:
        running.run(Store(tmp_path), [GROUP], (), 1)


def test_runs_that_share_a_folder_keep_each_others_cells(tmp_path):
    one, other = Store(tmp_path), Store(tmp_path)
    first, second, _ = tuning_cells(GROUP, {})
    one.add(finished(first, 0.5))
    other.add(finished(second, 0.4))
    lines = (tmp_path / "tiny.jsonl").read_text().splitlines()
    assert [json.loads(line)["key"] for line in lines] == sorted([first.key, second.key])
    assert [file.name for file in tmp_path.glob("[!.]*")] == ["tiny.jsonl"]


@pytest.mark.parametrize(
    ("second", "why"),
    [
        ('{"key": ', "Expecting value"),
        ("null", "it is null"),
        ({"log_loss": "abc"}, "log_loss is 'abc'"),
        ({"auc": [1]}, r"auc is \[1\]"),
        ({"key": 3}, "key is 3"),
        ({"split": "x"}, "split is 'x'"),
        ({"rate": None}, "rate is None"),
        ({"budget": "bytes=7"}, "the key is that of another cell"),
        ('{"key": "a", "dataset": "tiny"}', "without budget, method, version, form"),
        ("not finished", "without log_loss"),
    ],
)
def test_a_damaged_line_is_named(second, why, tmp_path):
    record = finished(tuning_cells(GROUP, {})[0], 0.5)
    if isinstance(second, dict):
        second = json.dumps(record | second)
    if second == "not finished":
        second = json.dumps({name: v for name, v in record.items() if name != "log_loss"})
    (tmp_path / "tiny.jsonl").write_text(f"{json.dumps(record)}\n{second}\n")
    with pytest.raises(ValueError, match=rf"tiny\.jsonl, line 2 .*{why}.* delete the line"):
        Store(tmp_path)


def test_what_is_no_file_of_cells_is_named(tmp_path):
    (tmp_path / "tiny.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"tiny\.jsonl holds no finished cells .*; move it away"):
        Store(tmp_path)
    (tmp_path / "tiny.jsonl").unlink()
    (tmp_path / "tiny.jsonl").mkdir()
    with pytest.raises(ValueError, match=r"tiny\.jsonl holds no finished cells"):
        Store(tmp_path)


def test_what_does_not_fit_is_recorded_and_shown(in_process, tmp_path):
    group = Group("tiny", 2, "low rank", "1.1", "bytes=100")
    store = Store(tmp_path)
    running.run(store, [group], (), 1)
    assert all("does_not_fit" in record for record in store.records.values())
    assert missing(group, store.records, ()) == []
    rows = rows_of([group], store.records, ())
    text = markdown(rows, {})
    assert "| low rank | does not fit: a table of 300 ids has 15 values" in text


def test_tables_show_paired_differences_and_edges():
    records = {}
    other = Group("tiny", 2, "hash", "1.1", "bytes=12000")
    for group, base in ((GROUP, 0.40), (other, 0.42)):
        for cell in tuning_cells(group, {}):
            records[cell.key] = finished(cell, cell.rate)
        (beyond,) = missing(group, records, ())
        records[beyond.key] = finished(beyond, 0.01)
        for cell in missing(group, records, ()):
            records[cell.key] = finished(cell, base + 0.1 * cell.split)
    row = rows_of([other], records, ())[0]
    # Splits differ by .1, methods by .02 on both: paired, there is no error.
    assert row.difference == pytest.approx((0.02, 0.0))
    (one,) = rows_of([other], records, (row.records[0]["split"],))
    assert one.difference == (pytest.approx(0.02), None)  # one split has no error to tell
    assert "| +0.0200 |" in markdown([one], {})
    text = markdown(rows_of([GROUP, other], records, ()), {"hash": ["ppd=64: AUC 0.5"]})
    assert "| hash † | 0.4700 | +0.0200 (0.0000) | 0.7000 | 12 |" in text
    assert "adagrad 0.01* |" in text
    assert "- hash: ppd=64: AUC 0.5" in text


def complete(group):
    """Records of all cells of `group`, the middle rate the best."""
    records = {c.key: finished(c, abs(c.rate - 0.1)) for c in tuning_cells(group, {})}
    return records | {c.key: finished(c, 0.4) for c in missing(group, records, ())}


def test_curves_are_written_for_each_data_set_and_number_of_passes(tmp_path):
    pytest.importorskip("matplotlib", reason="of the extra benchmarks")
    rows = rows_of([GROUP], complete(GROUP), ())
    (file,) = write_curves(rows, tmp_path)
    assert file.name == "tiny-2.png" and file.stat().st_size > 1000


def test_one_picture_shows_all_data_sets_that_have_several_budgets(tmp_path):
    pytest.importorskip("matplotlib", reason="of the extra benchmarks")
    groups = [replace(GROUP, budget=f"bytes={amount}") for amount in (90_000, 40_000)]
    records = complete(groups[0]) | complete(groups[1])
    names = [file.name for file in write_curves(rows_of(groups, records, ()), tmp_path)]
    assert names == ["tiny-2.png", "overview.png"]
    assert (tmp_path / "overview.png").stat().st_size > 1000


def test_without_matplotlib_there_are_no_curves_and_it_says_why(tmp_path, capsys):
    with mock.patch.dict("sys.modules", {"matplotlib": None}):
        assert write_curves(rows_of([GROUP], complete(GROUP), ()), tmp_path) == []
    assert "pip install -e '.[benchmarks]'" in capsys.readouterr().out


def test_a_rival_below_its_authors_figures_is_unreproduced():
    group = Group("ml-1m", 10, "CE", "1.1", "ppd=256")
    records = {}
    for cell in tuning_cells(group, {}):
        records[cell.key] = finished(cell, abs(cell.rate - 0.1))
    for cell in missing(group, records, ()):
        records[cell.key] = finished(cell, 0.4, auc=0.70)
    found = unreproduced(rows_of([group], records, ()))
    assert "author's 0.719" in found["CE"][0] and found["CE restarted"] == ["as CE is"]
    for record in records.values():
        record["auc"] = 0.711
    assert unreproduced(rows_of([group], records, ())) == {}


def test_an_estimate_counts_what_is_missing():
    cell = tuning_cells(GROUP, {})[0]
    text = estimate([GROUP], {cell.key: finished(cell, 0.5)}, (), 2)
    # Two rates and two splits are left, of 2 s each, on two cores.
    assert "| tiny | 4 | 2 | 0.0 |" in text


def test_the_grid_has_every_method_at_every_budget_once():
    selected = groups(Selection())
    assert len(selected) == len(set(selected))
    flights = {
        (g.passes, g.budget) for g in selected if g.dataset == "flights" and g.method == "CE"
    }
    assert flights == {
        (2, "bytes=880000"),
        (2, "bytes=420000"),
        (2, "bytes=200000"),
        (2, "bytes=100000"),
        (2, "share=0.05"),
        (1, "bytes=420000"),
    }
    full = [g for g in selected if g.method == "full" and g.dataset == "flights"]
    assert [(g.passes, g.budget) for g in full] == [(2, "none"), (1, "none")]


def test_quick_is_a_part_of_the_grid():
    assert set(groups(options.QUICK)) <= set(groups(Selection()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "CE restart"], "unknown method 'CE restart'; did you mean 'CE restarted'"),
        (["--datasets", "flight"], "did you mean 'flights'"),
        (["--budgets", "bytes=42000"], "did you mean 'bytes=420000'"),
        (["--only", "CCE"], "did you mean 'CCE, as published' or 'CCE, frequent recipe' or "),
        (["--budgets", "420000"], "has none of the forms bytes=880000"),
        (["--budgets", "none"], "full tables have no budget; they are --only full"),
        (["--datasets", "ml-1m", "--budgets", "bytes=420000"], "unknown budget 'bytes=420000'"),
        (["--passes", "7"], "unknown number of passes '7'"),
        (["--splits", "0", "100"], "--splits 100 chooses rates"),
        (["--splits", "20", "20"], "give different numbers, 0 or more"),
        (["--splits", "-1"], "give different numbers, 0 or more"),
        (["--jobs", "0"], "--jobs 0 must be 1 or more"),
        (["--quick", "--jobs", "0"], "--jobs 0 must be 1 or more"),
        (["--quick", "--only", "CE"], "--quick is a part of the grid by itself; leave out --only"),
        (["--results", __file__], "is no folder; give another one"),
        (["--data", "nowhere"], "--data nowhere is no folder of data sets"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(arguments, message):
    with pytest.raises(ValueError, match=message):
        options.selection(options.parser().parse_args(arguments))


@pytest.mark.parametrize("text", ["none", "bytes=880000", "share=0.05", "ppd=64"])
def test_budgets_are_read_as_they_are_written(text):
    assert str(Budget.parse(text)) == text


@pytest.mark.parametrize("text", ["bytes=inf", "bytes=1e400", "share=nan", "ppd=-1", "kb=3"])
def test_budgets_that_are_none(text):
    with pytest.raises(ValueError, match=f"budget '{text}' has none of the forms"):
        Budget.parse(text)


def test_shares_are_in_proportion_to_rows_and_add_up():
    shares = Budget.parse("bytes=1000").shares([100, 300], 16)
    assert [share.amount for share in shares] == [250, 750]
    shares = Budget.parse("share=0.5").shares([100, 300], 16)
    assert [share.values() for share in shares] == [800, 2400]


@pytest.mark.parametrize("name", ["ml-1m", "gowalla"])
def test_missing_data_are_told_with_the_way_to_get_them(name, monkeypatch):
    monkeypatch.delenv("CCE_DATA_DIR", raising=False)
    with pytest.raises(ValueError, match="give --data"):
        PROBLEMS[name].load(0)
    with pytest.raises(ValueError, match="give --data"):
        gowalla(Path("nowhere/gowalla.parquet"), 0)


def test_negatives_are_uniform_over_items_that_were_not_visited():
    rng = np.random.default_rng(0)
    users, items = np.divmod(rng.choice(20 * 6, size=60, replace=False), 6)
    drawn = unvisited(users, items, 6, 200, seed=1)
    for user in range(20):
        visited = set(items[users == user])
        found = drawn[users == user].reshape(-1)
        if len(found):
            assert not visited & set(found)
            counts = np.bincount(found, minlength=6)[[i for i in range(6) if i not in visited]]
            # 200 or more draws over at most 6 items: four standard errors around the mean.
            mean = counts.mean()
            assert abs(counts - mean).max() < 4 * mean**0.5


def test_most_ids_of_the_synthetic_data_are_rare():
    dataset = power_law(0, num_rows=20_000, scale=100)
    assert len(dataset.features) == len(CRITEO_IDS)
    column = list(dataset.features).index(dataset.compressed[0])
    counts = np.bincount(dataset.train.ids[:, column], minlength=dataset.features["c3"])
    assert np.quantile(counts, 0.9) < 0.05 * counts.max()
    assert 0.3 < float(dataset.train.labels.mean()) < 0.6


def test_ids_are_renumbered_alike_in_both_parts_of_every_split():
    old, new = tiny_dataset(0), renumbered(tiny_dataset(0))
    pairs = {
        (int(a), int(b))
        for part in ("train", "validation")
        for a, b in zip(getattr(old, part).ids[:, 0], getattr(new, part).ids[:, 0], strict=True)
    }
    assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})
    assert any(a != b for a, b in pairs)
    assert old.train.ids[:, 2].equal(new.train.ids[:, 2])  # it is not compressed
    assert list(SIZES) == new.compressed


def test_data_folder_is_an_option_or_the_environment(monkeypatch):
    monkeypatch.setenv("CCE_DATA_DIR", "here")
    assert problems.data_folder() == Path("here")
