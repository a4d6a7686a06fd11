"""Ids of a run that goes on from another: those that were there keep their numbers."""

import numpy as np
import pandas as pd
import pytest

from cce_torchrec.data import Share, TableDataset, TableOptions
from cce_torchrec.data.regroup import joined

COLUMNS = {"label": "y", "dense": ("x",), "categorical": ("item", "user")}


def day(folder, items, users, scale=1.0):
    """A file whose n-th row has the n-th item and user."""
    folder.mkdir(exist_ok=True)
    n = len(items)
    rows = {"y": np.arange(n) % 2, "x": scale * np.arange(n), "item": items, "user": users}
    path = folder / "rows.parquet"
    pd.DataFrame(rows).to_parquet(path)
    return path


def read(folder, path, earlier=None, **options):
    dataset = TableDataset(
        path,
        TableOptions(**COLUMNS, validation=str(path), folder=folder, earlier=earlier, **options),
    )
    rows = joined(list(dataset.validation_batches(Share(batch_size=64))))
    return dataset, rows


def numbers(rows, values, column=0):
    return dict(zip(values, rows.ids[:, column].tolist(), strict=True))


FIRST = [f"item-{n}" for n in (5, 1, 9, 3)] * 4
SECOND = [f"item-{n}" for n in (2, 9, 7, 1)] * 4
USERS = list(range(16))


def test_texts_keep_their_ids_and_new_ones_follow(tmp_path):
    one, first = read(tmp_path / "1", day(tmp_path / "1", FIRST, USERS))
    two, second = read(
        tmp_path / "2", day(tmp_path / "2", SECOND, [u + 8 for u in USERS]), tmp_path / "1"
    )
    before, after = numbers(first, FIRST), numbers(second, SECOND)
    assert one.features == {"item": 5, "user": 16}
    assert two.features == {"item": 7, "user": 24}  # those of day 1 that day 2 lacks, too
    assert {name: after[name] for name in ("item-9", "item-1")} == {
        name: before[name] for name in ("item-9", "item-1")
    }
    assert {after["item-2"], after["item-7"]} == {5, 6}
    # What is kept is read as it was found, and a third day goes on from it.
    again, same = read(tmp_path / "2", tmp_path / "2" / "rows.parquet", tmp_path / "1")
    assert same.ids.equal(second.ids)
    three, third = read(
        tmp_path / "3", day(tmp_path / "3", ["item-7", "item-8"] * 8, USERS), tmp_path / "2"
    )
    assert numbers(third, ["item-7", "item-8"] * 8)["item-7"] == after["item-7"]
    assert three.features == {"item": 8, "user": 24}
    assert again.features == two.features


def test_dense_columns_are_standardised_as_they_were(tmp_path):
    _, first = read(tmp_path / "1", day(tmp_path / "1", FIRST, USERS))
    path = day(tmp_path / "2", FIRST, USERS, scale=3.0)
    _, second = read(tmp_path / "2", path, tmp_path / "1")
    mean = np.arange(16).mean()
    assert np.allclose(first.dense[:, 0], (np.arange(16) - mean) / np.arange(16).std())
    assert np.allclose(second.dense[:, 0], (3 * np.arange(16) - mean) / np.arange(16).std())


def test_a_smaller_day_has_as_many_ids_as_before(tmp_path):
    read(tmp_path / "1", day(tmp_path / "1", FIRST, USERS))
    dataset, _ = read(
        tmp_path / "2", day(tmp_path / "2", ["item-1"] * 16, [3] * 16), tmp_path / "1"
    )
    assert dataset.features == {"item": 5, "user": 16}


def test_without_an_earlier_vocabulary_the_new_one_is_another(tmp_path):
    read(tmp_path / "1", day(tmp_path / "1", FIRST, USERS))
    dataset, _ = read(tmp_path / "2", day(tmp_path / "2", SECOND, USERS))
    assert dataset.features["item"] == 5


def test_a_kept_scan_of_another_earlier_day_is_not_taken(tmp_path):
    read(tmp_path / "1", day(tmp_path / "1", FIRST, USERS))
    path = day(tmp_path / "2", SECOND, USERS)
    alone, _ = read(tmp_path / "2", path)
    after, _ = read(tmp_path / "2", path, tmp_path / "1")
    assert (alone.features["item"], after.features["item"]) == (5, 7)
    with pytest.raises(ValueError, match="earlier were None, are"):
        read(tmp_path / "4", path)  # kept without
        read(tmp_path / "4", path, tmp_path / "1", resumes=True)


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ({}, {"ids": "hash", "hash_size": 50}, "by a vocabulary in .* and are by a hash now"),
        ({"ids": "hash", "hash_size": 40}, {"ids": "hash", "hash_size": 50}, "into 40 in"),
    ],
)
def test_ids_of_another_kind_are_refused(tmp_path, first, second, said):
    read(tmp_path / "1", day(tmp_path / "1", FIRST, USERS), **first)
    with pytest.raises(ValueError, match=said):
        read(tmp_path / "2", day(tmp_path / "2", SECOND, USERS), tmp_path / "1", **second)


def test_a_folder_without_a_vocabulary_is_refused(tmp_path):
    path = day(tmp_path / "2", SECOND, USERS)
    with pytest.raises(ValueError, match=r"none has no vocabulary\.parquet"):
        read(tmp_path / "2", path, tmp_path / "none")
