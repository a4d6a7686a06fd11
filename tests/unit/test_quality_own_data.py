"""The benchmark of methods on a table in the user's own files."""

import json
import sys
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch

from benchmarks.quality import options, training
from benchmarks.quality.__main__ import main
from benchmarks.quality.bags import in_batches, pooled, side_by_side
from benchmarks.quality.cells import Cell
from benchmarks.quality.grid import group_of, groups
from benchmarks.quality.own_data import own_problem
from benchmarks.quality.problems import PROBLEMS
from cce_torchrec.data import Bags, Rows

pa = pytest.importorskip("pyarrow", reason="of the extra data")
pq = pytest.importorskip("pyarrow.parquet")

COLUMNS = ["--label", "click", "--dense", "price", "--categorical", "user,shop"]


@pytest.fixture
def file(tmp_path):
    """600 rows of a user, a shop as text, and a list of items, none of which may be in it."""
    rng = np.random.default_rng(0)
    users = rng.integers(40, size=600)
    items = [rng.integers(30, size=n).tolist() for n in rng.integers(0, 5, size=600)]
    table = {"click": users % 2, "price": rng.normal(size=600), "user": users,
             "shop": [f"s{n}" for n in rng.integers(7, size=600)], "items": items}  # fmt: skip
    pq.write_table(pa.table(table), tmp_path / "clicks.parquet")
    return tmp_path / "clicks.parquet"


def parsed(file, *more, columns=COLUMNS, dataset="table"):
    return options.parser().parse_args(["--dataset", dataset, "--data", str(file), *columns, *more])


@pytest.fixture
def problem(file):
    """With sequences, whose table is compressed beside that of users."""
    own = own_problem(parsed(file, "--sequence", "items", "--compressed", "user,items"))
    with mock.patch.dict(PROBLEMS, {own.name: own}):
        yield own


@pytest.mark.parametrize("method", ["full", "hash", "ours", "DHE", "CCE, as published"])
def test_methods_train_on_it(problem, method):
    budget = "none" if method == "full" else "ppd=4"
    cell = Cell(group_of("own-clicks", 1, method, budget), 20, 20, "adagrad", 0.1)
    method_cell = replace(
        cell, form={"DHE": "wide", "CCE, as published": "4 chunks"}.get(method, "")
    )
    record = training.record_of(method_cell)
    assert 0 < record["log_loss"] < 1 and record["steps"] == 2


def test_embeddings_of_a_bag_are_added_up(problem):
    cell = Cell(group_of("own-clicks", 1, "full", "none"), 20, 20, "adagrad", 0.1)
    run = training.Run(cell)
    rows = next(in_batches(run.dataset.train, 50))
    seen = []
    run.network = lambda dense, embeddings: seen.append(embeddings)
    run.logits(rows, training=False)
    user, items, shop = seen[0].unbind(1)  # those that are compressed come first
    weight = run.embedder.rows.weight
    expected = torch.nn.functional.embedding_bag(
        rows.bags[0].values + run.dataset.features["user"],
        weight,
        torch.cat([torch.zeros(1, dtype=torch.int64), rows.bags[0].lengths.cumsum(0)[:-1]]),
        mode="sum",
    )
    assert torch.allclose(items, expected) and (rows.bags[0].lengths == 0).any()
    assert user.equal(weight[rows.ids[:, 0]]) and len(shop) == 50


def test_ids_stand_side_by_side_and_shorter_columns_repeat_theirs():
    bags = (
        Bags(torch.tensor([5, 6, 7]), torch.tensor([3, 0])),
        Bags(torch.tensor([]).long(), torch.tensor([0, 0])),
    )
    rows = Rows(torch.zeros(2, 1), torch.tensor([[1], [2]]), torch.zeros(2), bags)
    assert side_by_side(rows).tolist() == [[1, 5, 0], [2, 6, 0], [1, 7, 0]]
    vectors = side_by_side(rows)[:, :, None].float()
    assert pooled(vectors, rows, [0, 1, 2])[:, :, 0].tolist() == [[1, 18, 0], [2, 0, 0]]
    assert rows.ids is side_by_side(replace(rows, bags=()))
    parts = list(in_batches(rows, 1))
    assert [part.bags[0].values.tolist() for part in parts] == [[5, 6, 7], []]


def test_rates_are_chosen_on_rows_that_are_not_reported(file, tmp_path):
    pq.write_table(pq.read_table(file).slice(0, 100), tmp_path / "later.parquet")
    held = ("--compressed", "user", "--validation", str(tmp_path / "later.parquet"))
    own = own_problem(parsed(file, *held))
    assert len(own.load(20).validation) == 100 and len(own.load(20).train) == 600
    assert len(own.load(100).validation) + len(own.load(100).train) == 600
    assert own.load(20).validation.labels.equal(own.load(21).validation.labels)


def test_other_files_columns_and_settings_are_other_cells(file):
    held = ("--compressed", "user")
    first = own_problem(parsed(file, *held))
    assert first.version == own_problem(parsed(file, *held)).version
    others = [
        own_problem(parsed(file, *held, "--embedding-dim", "8")),
        own_problem(parsed(file, "--compressed", "shop")),
        own_problem(parsed(file, *held, "--batch-size", "128")),
        own_problem(parsed(file, *held, "--model", "gmf")),
    ]
    pq.write_table(pq.read_table(file).slice(0, 500), file)
    others.append(own_problem(parsed(file, *held)))
    assert len({first.version, *(other.version for other in others)}) == 6


def test_budgets_and_passes_are_those_of_the_options(file):
    args = parsed(file, "--compressed", "user", "--budgets", "bytes=1e3", "--passes", "2", "1")
    own = own_problem(args)
    with mock.patch.dict(PROBLEMS, {own.name: own}):
        asked = groups(options.selection(args, own))
    assert {(g.dataset, g.passes, g.budget) for g in asked} == {
        ("own-clicks", passes, budget) for passes in (2, 1) for budget in ("none", "bytes=1000")
    }
    assert own_problem(parsed(file, "--compressed", "user")).budgets == (
        "bytes=510", "bytes=130", "bytes=32",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "flights", "--label", "click"], "--label: --dataset .* columns of its own"),
        (["--dataset", "flights", "--model", "gmf"], "--model is for --dataset table or criteo"),
        (["--dataset", "table", "flights"], "table is run by itself"),
        (["--dataset", "table", "--label", "click"], "give --data a file or a folder"),
        (["--data", "FILE", "--categorical", "user"], "--label names the column of 0 and 1"),
        (["--data", "FILE", "--label", "click"], "--categorical or --sequence names"),
        (["--data", "FILE", *COLUMNS], "no feature has 1,000 ids, and none is compressed"),
        (["--data", "FILE", *COLUMNS, "--compressed", "usr"], "'usr'.* are no features"),
        (["--data", "FILE", *COLUMNS, "--batch-size", "0"], "--batch-size 0 must be 1 or more"),
        (
            ["--data", "FILE", *COLUMNS, "--compressed", "user", "--passes", "-1"],
            "--passes -1 must",
        ),
        (
            ["--data", "FILE", "--label", "price", "--categorical", "user"],
            "row 1, column 'price': the label is",
        ),
        (["--data", "FILE", *COLUMNS, "--sequence", "items", "--model", "gmf"], "multiplies two"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_trained(file, arguments, message):
    arguments = [str(file) if a == "FILE" else a for a in arguments]
    if "--dataset" not in arguments:
        arguments = ["--dataset", "table", *arguments]
    with pytest.raises(ValueError, match=message):
        own_problem(options.parser().parse_args(arguments))


def test_from_the_command_line(file, tmp_path, monkeypatch, capsys):
    command = ["quality", "--dataset", "table", "--data", str(file), *COLUMNS,
               "--compressed", "user", "--only", "hash", "--budgets", "ppd=4", "--splits", "20",
               "--jobs", "1", "--results", str(tmp_path / "out")]  # fmt: skip
    monkeypatch.setattr(sys, "argv", command)
    with mock.patch.dict(PROBLEMS):
        main()  # whose cells are computed in a process of their own
    told = capsys.readouterr().out
    assert "### own-clicks, 1 pass" in told and "| hash | 0." in told
    lines = (tmp_path / "out" / "own-clicks.jsonl").read_text().splitlines()
    assert {json.loads(line)["split"] for line in lines} == {100, 20}
    monkeypatch.setattr(sys, "argv", [*command, "--embedding-dim", "0"])
    with pytest.raises(SystemExit, match="error: --embedding-dim 0 must be 1 or more"):
        main()
