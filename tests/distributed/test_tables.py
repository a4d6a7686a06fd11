"""Tables in files on several ranks: the training program, and failures told to every rank."""

import shutil
from collections import Counter

import pytest
import torch.distributed as dist

from cce_torchrec.checkpoint.location import location
from cce_torchrec.data import Share, TableDataset, TableOptions
from cce_torchrec.data.kept_scan import FILE
from cce_torchrec.train.__main__ import main
from tests.support.ranks import on_ranks
from tests.support.run_folder import untimed
from tests.support.s3 import make_bucket, needs_s3, s3_server
from tests.support.tables import FLAT, OPTIONS, frame, write_csv, write_parquet
from tests.support.torchrun import forked

COLUMNS = ("--label", "click", "--dense", "price,age", "--categorical", "user,item")
SMALL = ("--batch-size", "64", "--compressed", "user", "--shuffle-rows", "99")


@on_ranks(2, 3)
def test_ranks_train_on_different_rows(rank, world_size, tmp_path):
    path, run = tmp_path / "a.parquet", tmp_path / "run"
    if rank == 0:
        write_parquet(path, frame(700))
    dataset = opened(path, TableOptions(**OPTIONS, folder=run, shuffle_rows=100))
    assert opened(path, TableOptions(**OPTIONS, folder=run)).features == dataset.features
    share = Share(batch_size=50, rank=rank, world_size=world_size)
    batches = list(dataset.batches(share, seed=0, epoch=1))
    own = [user for batch in batches for user in batch.ids[:, 0].tolist()]
    everyone = gathered(own)
    assert len(batches) == dataset.num_train // 50
    seen = Counter(user for users in everyone for user in users)
    assert set(seen.values()) == {1} and len(seen) == dataset.num_train // 50 * 50


def opened(path, options):
    """The data set, when every rank has come: the first may still be writing the file."""
    dist.barrier()
    return TableDataset(path, options)


def gathered(own):
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    return everyone


@on_ranks(1, 3)
def test_numbers_of_ids_are_those_of_one_rank(rank, world_size, tmp_path):
    path = tmp_path / f"{world_size}.csv"
    if rank == 0:
        write_csv(path, frame(500))
    found = opened(path, TableOptions(**FLAT, ids="vocabulary"))
    assert found.features["user"] == found.num_train + 1
    assert found.num_train + found.num_validation == 500


@on_ranks(2)
@pytest.mark.parametrize("row", [3, 650])
def test_a_bad_value_is_told_to_every_rank(rank, world_size, row, tmp_path):
    path, run = tmp_path / "a.parquet", tmp_path / "run"
    if rank == 0:
        write_parquet(path, frame(700).assign(click=[5 * (i == row) for i in range(700)]))
    with pytest.raises(ValueError, match=rf"row {row + 1}, column 'click': the label is 5"):
        opened(path, TableOptions(**FLAT, folder=run))
    assert not run.exists()


@on_ranks(2)
def test_a_file_that_one_rank_cannot_read(rank, world_size, tmp_path):
    path = tmp_path / f"{rank}.csv"  # each rank has a disk of its own
    write_csv(path, frame(100).assign(click=0 if rank == 0 else 7))
    with pytest.raises(ValueError, match=r"0.csv|does not exist"):
        opened(tmp_path / "none.csv", TableOptions(**FLAT))
    dataset = opened(tmp_path / "0.csv", TableOptions(**FLAT))
    if rank == 1:
        dataset.pieces = []  # as if its copy of the file had been cut off
    with pytest.raises(ValueError, match=r"fewer rows|batches of 1 ranks failed"):
        list(dataset.batches(Share(batch_size=8, rank=rank, world_size=2), seed=0, epoch=1))


@on_ranks(3)
def test_a_rank_without_rows(rank, world_size, tmp_path):
    path = tmp_path / "a.csv"
    if rank == 0:
        write_csv(path, frame(3))
    with pytest.raises(ValueError, match=r"\d rows to train on for 3 ranks, and \d that validate"):
        opened(path, TableOptions(**FLAT, validation_fraction=0.5))


@pytest.mark.parametrize("kind, ranks", [("parquet", 2), ("csv", 1)])
def test_a_run_is_resumed_with_the_next_example(tmp_path, kind, ranks):
    rows, path = frame(700), tmp_path / f"data.{kind}"
    options = ["--dataset", "table", "--data", path, *COLUMNS, *SMALL, "--epochs", "2"]
    if kind == "parquet":
        write_parquet(path, rows)
        options += ["--sequence", "tags,words"]
    else:
        write_csv(path, rows)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    done = forked(ranks, main, *options, "--out", whole)
    assert done.returncode == 0, done.stderr[-3000:]
    done = forked(ranks, main, *options, "--out", parts, "--checkpoint-every", "7")
    assert done.returncode == 0, done.stderr[-3000:]
    saved = sorted((parts / "checkpoints").glob("step-*"))
    assert len(saved) == 2 and (parts / FILE).exists()  # step 14 and the end
    shutil.rmtree(saved[-1])  # as if killed after the first
    done = forked(ranks, main, *options, "--out", parts, "--checkpoint-every", "7", "--resume")
    assert "resumed after step 14" in done.stdout, done.stderr[-3000:]
    assert untimed(whole) == untimed(parts)
    write_csv(path, rows[:600]) if kind == "csv" else write_parquet(path, rows[:600])
    done = forked(ranks, main, *options, "--out", parts, "--resume")
    assert f"{FILE} is of other data (files were" in done.stderr


@needs_s3
def test_a_vocabulary_in_an_object_store(tmp_path):
    path = write_csv(tmp_path / "a.csv", frame(500))
    options = ["--dataset", "table", "--data", path, *COLUMNS, *SMALL, "--epochs", "1"]
    with s3_server():
        make_bucket("tables")
        for out in ("s3://tables/run", str(tmp_path / "out")):
            done = forked(1, main, *options, "--out", out, "--vocabulary", "s3://tables/kept")
            assert done.returncode == 0, done.stderr[-3000:]
        assert [file.name for file in location("s3://tables/kept").iterdir()] == [FILE]
        other = [*options, "--dense", "age", "--resume", "--vocabulary", "s3://tables/kept"]
        done = forked(1, main, *other, "--out", tmp_path / "other")
        assert f"s3://tables/kept/{FILE} is of other data (dense were" in done.stderr


def test_gmf_on_two_columns(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", frame(500))
    options = ["--dataset", "table", "--data", path, "--label", "click", "--model", "gmf",
               "--categorical", "user,item", "--epochs", "1", *SMALL]  # fmt: skip
    done = forked(1, main, *options, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr[-3000:]
    done = forked(1, main, *options, "--out", tmp_path / "out", "--sequence", "tags")
    assert "--model gmf" in done.stderr
