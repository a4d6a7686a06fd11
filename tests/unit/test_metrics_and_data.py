"""Metrics against definitions, and the data readers on small files in the official shapes."""

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from cce_torchrec.data import load
from cce_torchrec.data.flights import FLIGHTS_COLUMNS, flights
from cce_torchrec.data.movielens import ml_1m
from cce_torchrec.data.synthetic import synthetic
from cce_torchrec.metrics import auc, log_loss
from cce_torchrec.train import options

DATA = Path(os.environ.get("CCE_DATA_DIR", "/nonexistent"))
real_data = pytest.mark.skipif(not DATA.is_dir(), reason="CCE_DATA_DIR is not set")


def test_auc_counts_pairs_and_halves_ties():
    logits, labels = torch.tensor([0.1, 0.4, 0.4, 0.8, 0.2]), torch.tensor([0.0, 0, 1, 1, 1])
    wins = [
        1.0 if p > n else 0.5 if p == n else 0.0
        for p in logits[labels == 1]
        for n in logits[labels == 0]
    ]
    assert auc(logits, labels) == pytest.approx(np.mean(wins))
    assert np.isnan(auc(logits, torch.ones(5)))


def test_log_loss_is_the_mean_over_rows():
    logits, labels = torch.randn(100), torch.randint(0, 2, (100,)).float()
    p = torch.sigmoid(logits.double())
    expected = -(labels * p.log() + (1 - labels) * (1 - p).log()).mean()
    assert log_loss(logits, labels) == pytest.approx(float(expected))


def ratings_dat(folder, num_users=20, per_user=12):
    rng = np.random.default_rng(0)
    lines = [
        f"{user}::{rng.integers(1, 50)}::{rating}::978300760"
        for user in range(1, num_users + 1)
        for rating in rng.choice([1, 2, 3, 4, 5], per_user)
    ]
    (folder / "ratings.dat").write_text("\n".join(lines) + "\n")
    users = [f"{u}::{'FM'[u % 2]}::25::{u % 7}::0{u}" for u in range(1, num_users + 1)]
    (folder / "users.dat").write_text("\n".join(users) + "\n")


def test_ml_1m_official_files(tmp_path):
    ratings_dat(tmp_path)
    gmf, dlrm = ml_1m(str(tmp_path), "gmf", 0), ml_1m(str(tmp_path), "dlrm", 0)
    assert list(gmf.features) == ["user", "item"]
    assert list(dlrm.features) == ["user", "item", "gender", "age", "occupation", "zip_code"]
    assert dlrm.features["gender"] == 2
    assert (torch.bincount(gmf.validation.ids[:, 0]) == 2).all()
    for data in (gmf, dlrm):
        for column, size in enumerate(data.features.values()):
            assert data.train.ids[:, column].max() < size
    other = ml_1m(str(tmp_path), "gmf", 1)
    assert not torch.equal(other.validation.ids, gmf.validation.ids)


def test_missing_files_and_columns(tmp_path):
    with pytest.raises(ValueError, match=r"neither ratings.parquet nor ratings.dat"):
        load("ml-1m", str(tmp_path), "gmf", 0)
    with pytest.raises(ValueError, match="give --data the folder"):
        load("ml-1m", None, "gmf", 0)
    with pytest.raises(ValueError, match=r"no file .*flights.parquet"):
        load("flights", str(tmp_path), "dlrm", 0)
    (tmp_path / "ratings.dat").write_text("1::2\n3::4\n")
    with pytest.raises(ValueError, match=r"ratings.dat lacks columns \['rating'\]"):
        load("ml-1m", str(tmp_path), "gmf", 0)
    frame = pd.DataFrame({name: [1] for name in FLIGHTS_COLUMNS if name != "tailnum"})
    frame.to_parquet(tmp_path / "flights.parquet")
    with pytest.raises(ValueError, match=r"flights.parquet lacks columns \['tailnum'\]"):
        load("flights", str(tmp_path), "dlrm", 0)


def test_synthetic_is_skewed_and_repeatable():
    data, again = (
        synthetic(0, num_ids=1000, num_rows=5000),
        synthetic(0, num_ids=1000, num_rows=5000),
    )
    assert torch.equal(data.train.ids, again.train.ids)
    counts = torch.bincount(data.train.ids[:, 0], minlength=1000).sort(descending=True).values
    assert counts[:10].sum() > 0.2 * counts.sum()


@real_data
def test_ml_1m_protocol():
    data = ml_1m(str(DATA / "ml-1m"), "gmf", 0)
    assert data.features == {"user": 6040, "item": 3668}
    assert (len(data.train), len(data.validation)) == (726_932, 12_080)


@real_data
def test_flights_from_the_package_equal_the_parquet_file():
    ours, shipped = flights(None, 0), flights(str(DATA / "flights.parquet"), 0)
    assert ours.features == shipped.features
    assert len(ours.train) + len(ours.validation) == 327_346
    assert ours.features["date_x_origin_x_hour"] == 19_432
    assert torch.equal(ours.train.labels, shipped.train.labels)
    assert torch.equal(ours.train.ids, shipped.train.ids)
    torch.testing.assert_close(ours.train.dense, shipped.train.dense, rtol=1e-3, atol=1e-3)


def test_a_run_is_resumed_with_the_same_options():
    first = options.parse(["--lr", "0.1", "--epochs", "3", "--out", "a"])
    again = options.parse(["--lr", "0.1", "--epochs", "3", "--out", "b", "--resume"])
    options.check_same(options.lasting(first), options.lasting(again), Path("c"))
    other = options.parse(["--lr", "0.2", "--epochs", "3"])
    with pytest.raises(ValueError, match=r"c: --lr was 0.1 and is 0.2; resume with the same"):
        options.check_same(options.lasting(first), options.lasting(other), Path("c"))
