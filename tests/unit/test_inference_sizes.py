"""Bytes that are computed against bytes that are there."""

import pytest
import torch
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
from torchrec.optim import RowWiseAdagrad

from cce_torchrec import (
    CCEEmbeddingBagCollection,
    CCEEmbeddingBagConfig,
    cluster,
    finalize,
    save_checkpoint,
)
from cce_torchrec.inference import inference_collection, save_inference, sizes_of
from tests.support.inference import many_tables, one_table

SCALARS = 64
"""Bytes of a table's numbers that are not counted."""


@pytest.mark.parametrize("data_type", ["fp32", "fp16", "int8", "int4"])
@pytest.mark.parametrize("changes", [[cluster], [cluster, finalize]])
def test_served_bytes_are_those_of_the_files(tmp_path, changes, data_type):
    collection = many_tables()
    for change in changes:
        change(collection)
    if data_type == "int4":  # whose rows have to be whole pairs of bytes
        collection = one_table()
        cluster(collection)
    found = sizes_of(collection, data_type=data_type)
    served = inference_collection(collection, data_type=data_type, lookup="portable")
    folder = save_inference(served, tmp_path / "one")
    rows, codes = (folder / name for name in ("rows.bin", "codes.bin"))
    assert found.total.served_rows == rows.stat().st_size
    # Tables begin at whole words, and there is one more.
    padding = codes.stat().st_size - found.total.served_codes
    assert 0 <= padding <= 8 * (len(found.tables) + 1)


def test_trained_bytes_are_those_of_the_tensors():
    config = CCEEmbeddingBagConfig(
        name="a", num_embeddings=10_000, embedding_dim=16, num_rows=20, track_counts=True
    )
    plain = EmbeddingBagConfig(name="p", num_embeddings=50, embedding_dim=8, feature_names=["p"])
    collection = CCEEmbeddingBagCollection([config, plain])
    held = [*collection.parameters(), *collection.buffers()]
    found = sizes_of(collection)
    there = sum(tensor.numel() * tensor.element_size() for tensor in held)
    assert 0 <= there - found.total.training <= SCALARS
    assert found.total.full == 4 * (10_000 * 16 + 50 * 8)
    assert found.tables[0].notes >= 10_000 // 2


def test_a_checkpoint_takes_what_training_does(tmp_path):
    collection = one_table(num_embeddings=200_000)
    found = sizes_of(collection).total.training
    folder = save_checkpoint(tmp_path, collection, step=1)
    there = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    assert there == pytest.approx(found, rel=0.05)


def test_codes_take_their_bits_and_no_more():
    """Within a hundredth, whatever their bits."""
    for rows in (2, 20, 300, 5000, 70_000):
        config = CCEEmbeddingBagConfig(
            name="a", num_embeddings=100_000, embedding_dim=16, num_rows=rows
        )
        one = sizes_of([config]).total
        expected = 100_000 * 4 * config.code_bits / 8
        assert one.codes == pytest.approx(expected, rel=0.01)
        assert one.served_codes == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    ("optimizer", "numbers_a_row"), [(None, 0), ("SGD", 0), (RowWiseAdagrad, 1), ("Adam", 8)]
)
def test_state_is_counted_by_chunk(optimizer, numbers_a_row):
    """Of a chunk's rows, four values wide: one for a row, or two for a value."""
    config = CCEEmbeddingBagConfig(
        name="a", num_embeddings=1000, embedding_dim=16, num_rows=20, num_helper_rows=30
    )
    assert sizes_of([config], optimizer=optimizer).total.optimizer == 4 * 50 * 4 * numbers_a_row


def test_a_model_has_the_tables_of_its_collections():
    plain = EmbeddingBagConfig(name="p", num_embeddings=50, embedding_dim=8, feature_names=["p"])
    model = torch.nn.ModuleDict({"one": one_table(), "other": EmbeddingBagCollection([plain])})
    found = sizes_of(model, optimizer="Adagrad")
    assert [own.name for own in found.tables] == ["a", "p"]
    assert found.total.training == sum(own.training for own in found.tables)
    lines = str(found).splitlines()
    assert lines[0].split()[:2] == ["table", "weights"] and lines[-1].startswith("all ")


def test_codes_that_were_never_learned_are_not_served(tmp_path):
    collection = many_tables()
    found = sizes_of(collection).total
    served = inference_collection(collection, lookup="portable")
    folder = save_inference(served, tmp_path / "one")
    assert found.served_codes == 0 and (folder / "codes.bin").stat().st_size == 8
    assert sizes_of(collection.embedding_bag_configs()).total.served_codes > 0


def test_what_has_two_names_counts_once():
    one = one_table()
    assert len(sizes_of(torch.nn.ModuleDict({"a": one, "b": one})).tables) == 1


def test_what_cannot_be_counted_is_refused():
    with pytest.raises(ValueError, match=r"bytes are in `packed`; give what was trained"):
        sizes_of(inference_collection(one_table(), lookup="portable"))
    narrow = EmbeddingBagConfig(name="p", num_embeddings=50, embedding_dim=10, feature_names=["p"])
    with pytest.raises(ValueError, match="table 'p': 10 values of int4 are no whole number of 16"):
        sizes_of([narrow], data_type="int4")
    with pytest.raises(ValueError, match="there are no tables"):
        sizes_of(torch.nn.Linear(1, 1))
    with pytest.raises(
        ValueError, match=r"optimizer 'Lamb' is none of \['Adagrad', .*whose state is"
    ):
        sizes_of(one_table(), optimizer="Lamb")
    with pytest.raises(ValueError, match="row type 'int2' is none of"):
        sizes_of(one_table(), data_type="int2")
