"""Embeddings of ids by themselves, and of all ids in files."""

import numpy as np
import pytest
import torch
from torchrec import EmbeddingBagCollection, KeyedJaggedTensor, PoolingType

from cce_torchrec import CCEEmbeddingBagCollection, cluster
from cce_torchrec.inference import (
    inference_collection,
    plain_collection,
    vectors,
    vectors_of,
    write_vectors,
)
from tests.support.inference import LIMITS, batch_of, many_tables


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    collection = many_tables()
    cluster(collection)
    return collection, inference_collection(collection, data_type="fp32")


def expected(collection, key, ids):
    """What the trained collection gives for bags of one id, where all other features have none."""
    inputs = list(dict.fromkeys(slot.feature for slot in collection.output.slots))
    feature = key.partition("@")[0]
    own = torch.tensor([int(name == feature) for name in inputs])
    batch = KeyedJaggedTensor(inputs, ids, lengths=own.repeat_interleave(len(ids)))
    with torch.no_grad():
        return collection(batch)[key]


def test_of_some_ids(trained):
    collection, served = trained
    for key in collection.output.keys:
        ids = torch.tensor([0, 7, 39, 7])
        assert torch.equal(vectors_of(served, key, ids), expected(collection, key, ids))
    raw = torch.tensor([-(2**62), 2**62])
    assert torch.equal(vectors_of(served, "raw", raw), expected(collection, "raw", raw))


@pytest.mark.parametrize("key", ["f", "g@a", "g@plain", "h@wide", "y"])
@pytest.mark.parametrize("suffix", [".npy", ".parquet"])
def test_of_all_ids_in_a_file(trained, key, suffix, tmp_path, monkeypatch):
    # Several blocks, the last of which is shorter.
    monkeypatch.setitem(vectors._BLOCK_BYTES, suffix, 1200)
    collection, served = trained
    path = write_vectors(served, key, tmp_path / "new" / f"one{suffix}")
    if suffix == ".npy":
        found = np.load(path, mmap_mode="r")
    else:
        parquet = pytest.importorskip("pyarrow.parquet")
        table = parquet.read_table(path)
        assert table["id"].to_pylist() == list(range(len(table)))
        found = np.stack(table["vector"].to_numpy())
    count = len(next(f.ids for f in served.packed.features if f.key == key))
    assert found.dtype == np.float32 and len(found) == count
    ids = torch.arange(count)
    assert np.array_equal(found, expected(collection, key, ids).numpy())
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_what_cannot_be_written_is_refused(trained, tmp_path, monkeypatch):
    _, served = trained
    with pytest.raises(ValueError, match="no feature 'z'; the collection has"):
        write_vectors(served, "z", tmp_path / "one.npy")
    with pytest.raises(ValueError, match="feature 'raw' has raw ids"):
        write_vectors(served, "raw", tmp_path / "one.npy")
    with pytest.raises(ValueError, match=r"written as \.npy or \.parquet"):
        write_vectors(served, "f", tmp_path / "one.csv")
    with pytest.raises(ValueError, match=r"id 60 is outside \[0, 60\)"):
        vectors_of(served, "y", torch.tensor([LIMITS["y"]]))
    write_vectors(served, "f", tmp_path / "one.npy")
    with pytest.raises(ValueError, match="is there already"):
        write_vectors(served, "f", tmp_path / "one.npy")

    def fails(*_):
        raise OSError("No space left on device")

    monkeypatch.setitem(vectors._WRITERS, ".npy", fails)
    with pytest.raises(ValueError, match=r"two\.npy cannot be written \(No space left"):
        write_vectors(served, "f", tmp_path / "two.npy")
    assert [file.name for file in tmp_path.iterdir()] == ["one.npy"]


@pytest.mark.parametrize("is_weighted", [False, True])
def test_a_plain_collection_gives_the_same(is_weighted):
    torch.manual_seed(0)
    names = {"a", "plain", "wide", "ce", "restarted", "joint"}
    tables = [
        table
        for table in many_tables().embedding_bag_configs()
        if table.name in names and not (is_weighted and table.pooling == PoolingType.MEAN)
    ]
    collection = CCEEmbeddingBagCollection(tables, is_weighted=is_weighted)
    cluster(collection)
    plain = plain_collection(collection)
    assert type(plain) is EmbeddingBagCollection
    batch = batch_of(collection, 9)
    found, wanted = plain(batch), collection(batch)
    assert found.keys() == wanted.keys()
    assert torch.allclose(found.values(), wanted.values(), atol=1e-6)
    assert [config.name for config in plain.embedding_bag_configs()][-2:] == ["joint_x", "joint_y"]


def test_what_has_no_plain_form_is_refused():
    with pytest.raises(ValueError, match="no mean of weighted bags"):
        plain_collection(many_tables(is_weighted=True))
    with pytest.raises(ValueError, match="table 'raw' has raw ids"):
        plain_collection(many_tables())
