"""What a run takes over of an earlier one: tables as they were, and how its ids are numbered."""

from __future__ import annotations

import pytest
import torch
from torchrec import KeyedJaggedTensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from cce_torchrec import CCEEmbeddingBagCollection, CCEEmbeddingBagConfig
from cce_torchrec.checkpoint import save_checkpoint
from cce_torchrec.train import options, run_folder
from cce_torchrec.train.warm_start import WarmStart, earlier_vocabulary

CCE = {"embedding_dim": 8, "num_chunks": 2, "weight_init_min": -1.0, "weight_init_max": 1.0}


def collection(*tables):
    return torch.nn.Sequential(CCEEmbeddingBagCollection(list(tables)))


def table(name, ids, rows, **other):
    return CCEEmbeddingBagConfig(
        name=name, num_embeddings=ids, num_rows=rows, feature_names=[name], **CCE | other
    )


def plain(name, ids):
    return EmbeddingBagConfig(name=name, num_embeddings=ids, embedding_dim=8, feature_names=[name])


@pytest.fixture
def earlier(tmp_path):
    """A run with a compressed table `a` and a plain one `b`, of 40 and 30 ids."""
    model = collection(table("a", 40, 4, seed=3), plain("b", 30))
    save_checkpoint(tmp_path / "checkpoints", model, step=7)
    return model, WarmStart.from_run(str(tmp_path))


def test_tables_keep_their_form(earlier):
    _, start = earlier
    assert start.compressed(["a", "b", "c", "d"], ["b", "c"]) == ["a", "c"]


def test_tables_keep_their_rows_and_new_ones_have_theirs(earlier):
    _, start = earlier
    now = start.as_before(table("a", 60, 9, num_helper_rows=2, seed=5))
    assert (now.num_embeddings, now.num_rows, now.num_helper_rows, now.seed) == (60, 4, 12, 3)
    assert not now.has_custom_init
    other = table("c", 60, 9)
    assert start.as_before(other) is other


def test_what_fits_is_loaded_and_ids_keep_their_vectors(earlier):
    model, start = earlier
    tables = [table("a", 60, 9), plain("b", 33), table("c", 50, 3)]
    again = collection(*map(start.as_before, tables))
    report = start.load(again, [])
    assert report.loaded == ["0.a", "0.b"] and report.grown == ["0.a", "0.b"]
    assert report.new == ["0.c"]
    ids = torch.arange(30)
    one = model[0](_batch(["a", "b"], ids))["a"]
    two = again[0](_batch(["a", "b", "c"], ids))["a"]
    assert torch.equal(one, two)


def _batch(keys, ids):
    lengths = torch.ones(len(keys) * len(ids), dtype=torch.int32)
    return KeyedJaggedTensor(keys=keys, values=ids.repeat(len(keys)), lengths=lengths)


def test_a_run_without_a_checkpoint_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"--warm-start .*; name the --out of a run with"):
        WarmStart.from_run(str(tmp_path / "nothing"))


def test_the_vocabulary_is_where_the_run_kept_it(tmp_path):
    assert earlier_vocabulary(str(tmp_path)) == tmp_path
    words = "--dataset table --data d --label y --categorical a --vocabulary /kept"
    args = options.parse(words.split())
    args.out = tmp_path
    run_folder.claim(args)
    assert str(earlier_vocabulary(str(tmp_path))) == "/kept"
