"""Trained full tables as codes and codebooks."""

import faiss
import numpy as np
import pytest
import torch
from torchrec import KeyedJaggedTensor
from torchrec.modules.embedding_configs import DataType

from cce_torchrec import CCEEmbeddingBagCollection, CCEEmbeddingBagConfig
from cce_torchrec.clustering import import_curve, import_table, imported
from cce_torchrec.inference import inference_collection, vectors_of


def collection_of(num_rows=16, ids=5000, dim=16, **kwargs):
    fields = {"num_helper_rows": 0, "feature_names": ["f"], **kwargs}
    return CCEEmbeddingBagCollection(
        [
            CCEEmbeddingBagConfig(
                name="t", num_embeddings=ids, embedding_dim=dim, num_rows=num_rows, **fields
            )
        ]
    )


def full_table(ids=5000, dim=16, seed=0):
    """Rows of some correlation, and with ids of unequal lengths, as trained ones have."""
    random = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=random)
    scale = torch.rand(ids, 1, generator=random) + 0.2
    return torch.randn(ids, dim, generator=random) @ mixing * scale


def looked_up(collection):
    served = inference_collection(collection, data_type="fp32", lookup="portable")
    return vectors_of(served, "f", torch.arange(collection.tables[0].config.num_embeddings))


def relative(found, weight, counts=None):
    counts = torch.ones(len(weight)) if counts is None else counts.float()
    off, all_ = (found - weight).square().sum(1), weight.square().sum(1)
    return float((off * counts).sum() / (all_ * counts).sum())


@pytest.mark.parametrize("num_rows", [16, 64])
def test_errors_are_those_of_faiss_product_quantizer(num_rows):
    weight = full_table()
    collection = collection_of(num_rows)
    report = import_table(collection, "t", weight, samples_per_centroid=None)
    assert report.error == pytest.approx(relative(looked_up(collection), weight), rel=1e-5)
    quantizer = faiss.ProductQuantizer(16, 4, num_rows.bit_length() - 1)
    quantizer.train(weight.numpy())
    decoded = torch.from_numpy(quantizer.decode(quantizer.compute_codes(weight.numpy())))
    # Starts are random on both sides; 1.005 is the goal of means over data sets.
    assert report.error < 1.02 * relative(decoded, weight)


def test_samples_and_blocks_come_close_to_all_ids(monkeypatch, tmp_path):
    weight = full_table()
    every = import_table(collection_of(), "t", weight, samples_per_centroid=None)
    monkeypatch.setattr(imported, "_BLOCK", 1024)
    np.save(tmp_path / "full.npy", weight.numpy())
    mapped = np.load(tmp_path / "full.npy", mmap_mode="r")
    collection = collection_of()
    sampled = import_table(collection, "t", mapped, samples_per_centroid=100)
    assert sampled.error == pytest.approx(relative(looked_up(collection), weight), rel=1e-5)
    assert every.error <= sampled.error < 1.1 * every.error


def test_counts_move_the_error_to_rare_ids():
    weight = full_table()
    counts = torch.where(torch.arange(5000) < 500, 1000, 1)
    plain, weighted = collection_of(), collection_of()
    import_table(plain, "t", weight, samples_per_centroid=None)
    report = import_table(weighted, "t", weight, counts=counts, samples_per_centroid=None)
    assert report.error == pytest.approx(relative(looked_up(weighted), weight, counts), rel=1e-5)
    # .908 of it: K-means by counts, and not rounding, makes the difference.
    assert report.error < 0.95 * relative(looked_up(plain), weight, counts)


def test_few_different_rows_are_kept_as_they_are():
    weight = full_table(ids=7).repeat(100, 1)
    collection = collection_of(ids=700)
    assert import_table(collection, "t", weight).error < 1e-12
    assert torch.allclose(looked_up(collection), weight, atol=1e-6)


def test_an_imported_table_is_trained_on():
    weight = full_table()
    collection = collection_of()
    import_table(collection, "t", weight)
    before = looked_up(collection)
    optimizer = torch.optim.SGD(collection.parameters(), lr=0.1)
    batch = KeyedJaggedTensor(["f"], torch.arange(64), lengths=torch.ones(64).int())
    collection(batch).values().square().sum().backward()
    optimizer.step()
    assert looked_up(collection)[:64].square().sum() < before[:64].square().sum()


def test_the_curve_falls_with_the_rows_and_counts_the_bytes_of_all_ids():
    weight = full_table()
    curve = import_curve(weight, rows=(4, 16, 64), most_ids=1000)
    assert [report.error for report in curve] == sorted((r.error for r in curve), reverse=True)
    for report, num_rows in zip(curve, (4, 16, 64), strict=True):
        assert report.table_bytes == collection_of(num_rows).tables[0].config.table_bytes
        assert report.full_bytes == 5000 * 16 * 4
    assert "relative squared error" in str(curve[0])


def test_a_table_of_hashed_ids_is_refused():
    """Row i of a full table is id i, and there it would be read by other raw ids."""
    with pytest.raises(ValueError, match="table 't' hashes raw ids"):
        import_table(collection_of(hash_ids=True), "t", full_table())
    with pytest.raises(ValueError, match=r"the weight is torch\.complex64, and rows are"):
        import_table(collection_of(), "t", full_table() * 1j)
    with pytest.raises(ValueError, match=r"the weight is \[\], most_ids 100000; give"):
        import_curve([1.0])


def test_what_cannot_be_imported_is_refused():
    weight = full_table()
    collection = collection_of()
    before = collection.state_dict()
    before = {key: value.clone() for key, value in before.items()}
    with pytest.raises(ValueError, match=r"no CCE table 'u'; the collection has \['t'\]"):
        import_table(collection, "u", weight)
    with pytest.raises(ValueError, match=r"table 't' is \[5000, 16\], the weight \[5000, 8\]"):
        import_table(collection, "t", weight[:, :8])
    with pytest.raises(ValueError, match=r"table 't' has 5000 ids, the counts \[3\]"):
        import_table(collection, "t", weight, counts=torch.ones(3))
    with pytest.raises(ValueError, match="configure it with num_helper_rows=0"):
        import_table(collection_of(num_helper_rows=4), "t", weight)
    broken = weight.clone()
    broken[4321, 3] = float("nan")
    for per_centroid in (None, 2):  # found in the sample, and in a block
        with pytest.raises(ValueError, match="table 't': the weight of id 4321 is NaN"):
            import_table(collection, "t", broken, samples_per_centroid=per_centroid)
    with pytest.raises(ValueError, match="none of the ids that were drawn occurs"):
        import_table(collection, "t", weight, counts=np.zeros(5000, dtype=np.int64))
    with pytest.raises(ValueError, match=r"counts are integers of 0 or more; got torch.float32"):
        import_table(collection, "t", weight, counts=torch.full((5000,), 0.5))
    with pytest.raises(ValueError, match="samples_per_centroid 0 must be 1 or more"):
        import_table(collection, "t", weight, samples_per_centroid=0)
    half = collection_of(data_type=DataType.FP16)
    with pytest.raises(ValueError, match=r"too large for its data_type, torch\.float16"):
        import_table(half, "t", weight * 1e5)
    after = collection.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
