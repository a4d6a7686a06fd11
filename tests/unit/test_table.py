"""Tables in files as examples, against what pandas reads of the same files."""

import os
from collections import Counter
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from cce_torchrec.data import Share, TableDataset, TableOptions
from cce_torchrec.data.dataset import Bags
from cce_torchrec.data.kept_scan import FILE
from cce_torchrec.data.regroup import joined
from cce_torchrec.data.values import keys
from cce_torchrec.train import data_options
from tests.support.tables import FLAT, OPTIONS, frame, write_criteo, write_csv, write_parquet

DATA = Path(os.environ.get("CCE_DATA_DIR", "/nonexistent"))
WHOLE = Share(batch_size=64)


def read(dataset, share=WHOLE, **order):
    """All rows that an epoch gives."""
    return joined(list(dataset.batches(share, **{"seed": 0, "epoch": 1, **order})))


def validation(dataset, share=WHOLE):
    return joined(list(dataset.validation_batches(share)))


def users(rows):
    return rows.ids[:, 0].tolist()


@pytest.fixture
def small_pieces(monkeypatch):
    """Files of hundreds of rows in several pieces."""
    for name, least in (("PIECE_ROWS", 100), ("BLOCK_ROWS", 70)):
        monkeypatch.setattr(f"cce_torchrec.data.parquet_files.{name}", least)
    for name in ("_PIECE_BYTES", "_LINE_BYTES"):
        monkeypatch.setattr(f"cce_torchrec.data.text_files.{name}", 2000)


@pytest.mark.parametrize("write, name", [(write_parquet, "a.parquet"), (write_csv, "a.csv")])
def test_rows_are_those_of_the_file(tmp_path, small_pieces, write, name):
    rows = frame()
    dataset = TableDataset(write(tmp_path / name, rows), TableOptions(**FLAT))
    train, held = read(dataset), validation(dataset)
    assert len(dataset.pieces) > 5
    assert sorted(users(train) + users(held) + unfilled(dataset, train)) == list(range(1000))
    assert 60 < dataset.num_validation == len(held) < 140  # a tenth of 1,000, by a hash
    items = sorted(rows["item"].unique(), key=key)
    kept = rows.loc[~rows["user"].isin(users(held))]
    for part in (train, held):
        mine = rows.loc[users(part)]
        assert part.labels.tolist() == mine["click"].tolist()
        assert part.ids[:, 1].tolist() == [1 + items.index(item) for item in mine["item"]]
        for column, name in enumerate(["price", "age"]):
            mean, spread = kept[name].mean(), kept[name].std(ddof=0)
            expected = ((mine[name] - mean) / spread).fillna(0)
            np.testing.assert_allclose(part.dense[:, column], expected, rtol=1e-5, atol=1e-5)


def key(text):
    """Of a vocabulary, as the documents tell other programs."""
    state, content = mixed(len(text.encode())), text.encode()
    for first in range(0, len(content), 8):
        state = mixed(state ^ int.from_bytes(content[first : first + 8], "little"))
    return state - 2**64 * (state >= 2**63)


def mixed(z):
    """SplitMix64's output of a state."""
    for shift, multiplier in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ z >> shift) * multiplier % 2**64
    return z ^ z >> 31


@pytest.mark.parametrize("form", [pa.large_string(), pa.string()])
def test_keys_of_texts(form):
    texts = ["a", "", "item 12", "eight by", "nine byte", "\0", "\0\0", "ä" * 40, "a", "68fd1e64"]
    array = pa.array(["cut off", *texts], form)[1:]
    found = keys(array, "c", text=True)
    assert found.values.tolist() == [key(text) for text in texts]
    assert found.missing.tolist() == [not text for text in texts]
    assert len(set(found.values.tolist())) == len(set(texts))


def unfilled(dataset, train):
    """Rows to train on that fill no batch."""
    every = read(dataset, Share(batch_size=1))
    return sorted(set(users(every)) - set(users(train)))


def test_all_rows_in_memory(tmp_path, small_pieces):
    rows = frame()
    dataset = TableDataset(write_parquet(tmp_path / "a.parquet", rows), TableOptions(**OPTIONS))
    whole = dataset.in_memory()
    assert sorted(users(whole.train) + users(whole.validation)) == list(range(1000))
    assert users(whole.validation) == users(validation(dataset))
    batch = next(whole.batches(WHOLE, seed=0, epoch=1))
    assert batch.labels.tolist() == rows["click"][users(batch)].tolist()
    assert batch.bags[0].lengths.tolist() == rows["tags"][users(batch)].map(len).tolist()
    assert (whole.num_train, whole.num_dense) == (dataset.num_train, dataset.num_dense)


def test_lists_are_bags(tmp_path, small_pieces):
    rows = frame()
    dataset = TableDataset(write_parquet(tmp_path / "a.parquet", rows), TableOptions(**OPTIONS))
    assert list(dataset.features) == ["user", "item", "tags", "words"]
    part = read(dataset)
    for bags, column in zip(part.bags, ["tags", "words"], strict=True):
        got = [values.tolist() for values in bags.values.split(bags.lengths.tolist())]
        expected = [list(row) for row in rows.loc[users(part), column]]
        if column == "tags":
            assert got == expected
        else:  # numbered by a vocabulary: as many ids as words, the same for the same
            pairs = {(w, i) for ws, ids in zip(expected, got, strict=True)
                     for w, i in zip(ws, ids, strict=True)}  # fmt: skip
            assert len(pairs) == len(dict(pairs)) == 50 and dataset.features["words"] == 51


def test_bags_are_taken_by_row():
    bags = Bags(torch.tensor([1, 2, 3, 4, 5, 6]), torch.tensor([2, 0, 3, 1]))
    taken = bags.take(torch.tensor([3, 1, 0, 2, 0]))
    assert taken.values.tolist() == [6, 1, 2, 3, 4, 5, 1, 2]
    assert taken.lengths.tolist() == [1, 0, 2, 3, 2]


@pytest.mark.parametrize("ids", ["vocabulary", "hash"])
@pytest.mark.parametrize("write, name", [(write_parquet, "a.parquet"), (write_csv, "a.tsv")])
def test_ids_are_numbered(tmp_path, small_pieces, write, name, ids):
    rows = frame(400)
    rows["user"] = rows["user"] * 10**15 - 10**17  # no table has as many rows
    options = TableOptions(**FLAT, ids=ids, hash_size=5000)
    dataset = TableDataset(write(tmp_path / name, rows), options)
    train, held = read(dataset, Share(batch_size=1)), validation(dataset)
    both = torch.cat([train.ids, held.ids])
    assert both.min() >= 0
    assert (both.max(0).values < torch.tensor(list(dataset.features.values()))).all()
    if ids == "hash":
        assert list(dataset.features.values()) == [5000, 5000]
        assert len(set(both[:, 0].tolist())) > 370 and both.min() > 0
    else:
        assert sorted(users(train)) == list(range(1, dataset.num_train + 1))
        assert set(users(held)) == {0}  # users that training never sees


@pytest.mark.parametrize("value", [None, "", "unseen"])
def test_what_the_vocabulary_lacks_is_id_0(tmp_path, value):
    rows, others = frame(50), frame(20)
    others["item"] = others["item"].where(others.index > 3, value)
    others = others[others["item"].isin([*rows["item"], value])]
    options = TableOptions(**FLAT, validation=str(write_parquet(tmp_path / "b.parquet", others)))
    dataset = TableDataset(write_parquet(tmp_path / "a.parquet", rows), options)
    assert [i == 0 for i in validation(dataset).ids[:, 1]] == [i < 4 for i in others.index]


def test_a_file_that_validates(tmp_path):
    (tmp_path / "train").mkdir()
    rows = frame(500)
    write_csv(tmp_path / "train" / "1.csv", rows[:200])
    write_csv(tmp_path / "train" / "2.csv", rows[200:400][rows.columns[::-1]])  # in another order
    write_csv(tmp_path / "held.csv", rows[400:])
    options = TableOptions(**FLAT, validation=str(tmp_path / "held.csv"))
    dataset = TableDataset(tmp_path / "train", options)
    assert sorted(users(read(dataset, Share(batch_size=1)))) == list(range(400))
    assert users(validation(dataset)) == list(range(400, 500))


@pytest.mark.parametrize("shuffle_rows, reads", [(1000, 1), (10, 2)])
def test_few_rows_that_validate_are_read_once(tmp_path, small_pieces, shuffle_rows, reads):
    path = write_parquet(tmp_path / "a.parquet", frame())
    dataset = TableDataset(path, TableOptions(**OPTIONS, shuffle_rows=shuffle_rows))
    with mock.patch.object(dataset, "_rows", wraps=dataset._rows) as read_again:
        first, again = validation(dataset), validation(dataset)
    assert read_again.call_count == reads
    assert torch.equal(first.ids, again.ids) and torch.equal(first.labels, again.labels)


def test_an_epoch_depends_on_its_number_and_on_nothing_read_before(tmp_path, small_pieces):
    options = TableOptions(**OPTIONS, shuffle_rows=200)
    dataset = TableDataset(write_parquet(tmp_path / "a.parquet", frame()), options)
    first = [users(b) for b in dataset.batches(WHOLE, seed=1, epoch=1)]
    assert len(first) == dataset.steps(64)
    assert first == [users(b) for b in dataset.batches(WHOLE, seed=1, epoch=1)]
    for done in (1, 2, 3, 7, len(first)):  # windows have 3 batches
        rest = dataset.batches(WHOLE, seed=1, epoch=1, done=done)
        assert first[done:] == [users(b) for b in rest]
    for other in ({"seed": 2, "epoch": 1}, {"seed": 1, "epoch": 2}):
        assert first != [users(b) for b in dataset.batches(WHOLE, **other)]
    assert first[0] != sorted(first[0])


@pytest.mark.parametrize("ranks, batch_size", [(2, 64), (3, 64), (3, 7), (2, 5000)])
def test_ranks_share_the_rows(tmp_path, small_pieces, ranks, batch_size):
    path = write_parquet(tmp_path / "a.parquet", frame())
    dataset = TableDataset(path, TableOptions(**FLAT, shuffle_rows=150))
    shares = [Share(batch_size=batch_size, rank=r, world_size=ranks) for r in range(ranks)]
    by_rank = [list(dataset.batches(share, seed=0, epoch=1)) for share in shares]
    sizes = [tuple(map(len, step)) for step in zip(*by_rank, strict=True)]
    whole = min(batch_size, dataset.num_train)
    assert len(sizes) == dataset.steps(batch_size)
    assert set(sizes) == {tuple(map(len, torch.arange(whole).tensor_split(ranks)))}
    seen = Counter(user for batches in by_rank for b in batches for user in users(b))
    assert len(seen) == whole * len(sizes) and set(seen.values()) == {1}
    held = [list(dataset.validation_batches(share)) for share in shares]
    assert len({len(batches) for batches in held}) == 1
    together = sorted(user for batches in held for b in batches for user in users(b))
    assert together == sorted(users(validation(dataset)))


@pytest.mark.parametrize("kind", ["int8", "uint64", "float64", "Int64", "bool", "category"])
def test_types_of_integers(tmp_path, kind):
    rows = frame(100)
    rows["user"] = (rows["user"] % 2).astype(kind)
    dataset = TableDataset(write_parquet(tmp_path / "a.parquet", rows), TableOptions(**FLAT))
    assert dataset.features["user"] == 2


@pytest.mark.parametrize("kind", [pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_types_of_text(tmp_path, kind):
    table = pa.Table.from_pandas(frame(100))
    table = table.set_column(4, "item", table["item"].cast(kind))
    pq.write_table(table, tmp_path / "a.parquet")
    dataset = TableDataset(tmp_path / "a.parquet", TableOptions(**FLAT))
    plain = TableDataset(write_parquet(tmp_path / "b.parquet", frame(100)), TableOptions(**FLAT))
    assert torch.equal(validation(dataset).ids, validation(plain).ids)


def test_a_vocabulary_is_built_once(tmp_path, small_pieces):
    path = write_parquet(tmp_path / "a.parquet", frame())
    options = TableOptions(**OPTIONS, folder=tmp_path / "run")
    made = TableDataset(path, options)
    kept = pd.read_parquet(tmp_path / "run" / FILE)
    assert sorted(kept["column"].unique()) == ["item", "words"]
    item = kept[kept["column"] == "item"]
    assert {key(text) for text in frame()["item"]} == set(item["key"])
    with mock.patch("cce_torchrec.data.table.scan", side_effect=AssertionError("scanned again")):
        again = TableDataset(path, options)
    assert again.features == made.features
    for a, b in zip(made.batches(WHOLE, seed=0, epoch=1), again.batches(WHOLE, seed=0, epoch=1),
                    strict=True):  # fmt: skip
        assert torch.equal(a.ids, b.ids) and torch.equal(a.dense, b.dense)
        assert torch.equal(a.bags[1].values, b.bags[1].values)
    assert [file.name for file in (tmp_path / "run").iterdir()] == [FILE]


@pytest.mark.parametrize("name", ["train.txt", "day_0"])
def test_criteo_s_form(tmp_path, small_pieces, name):
    path = write_criteo(tmp_path / name)
    dataset = TableDataset(path, data_options.criteo_options(ids="hash"))
    rows = pd.read_csv(path, sep="\t", header=None, dtype={c: str for c in range(14, 40)})
    one = read(dataset, Share(batch_size=1), seed=0, epoch=1)
    both = torch.cat([one.dense, validation(dataset).dense]).double()
    expected = np.log1p(rows[range(1, 14)].fillna(0).to_numpy())
    assert list(dataset.features)[::25] == ["C1", "C26"] and len(both) == 300
    torch.testing.assert_close(both.sum(0), torch.from_numpy(expected).sum(0), rtol=1e-5, atol=0)
    missing = rows[range(14, 40)].isna().sum().sum()
    assert int((torch.cat([one.ids, validation(dataset).ids]) == 0).sum()) == missing


def test_a_folder_of_days(tmp_path):
    for day in range(3):
        write_criteo(tmp_path / f"day_{day}", num_rows=50 + day, seed=day)
    dataset = TableDataset(tmp_path, data_options.criteo_options())
    assert dataset.num_train + dataset.num_validation == 153


@pytest.mark.skipif(not DATA.is_dir(), reason="CCE_DATA_DIR is not set")
def test_criteo_s_sample():
    dataset = TableDataset(DATA / "criteo_sample.csv", data_options.criteo_options())
    assert dataset.num_train + dataset.num_validation == 200
    frame = pd.read_csv(DATA / "criteo_sample.csv")
    labels = torch.cat([read(dataset, Share(batch_size=1)).labels, validation(dataset).labels])
    assert labels.sum() == frame["label"].sum()
