"""Tables of a checkpoint against those of a model."""

from types import SimpleNamespace

import pytest
import torch

from cce_torchrec import CCEEmbeddingBagCollection, CCEEmbeddingBagConfig
from cce_torchrec.checkpoint import load_checkpoint, save_checkpoint
from cce_torchrec.clustering import ClusteringSchedule
from cce_torchrec.train.trainer import Trainer


def raw(**kwargs):
    settings = dict(name="t", num_embeddings=50, embedding_dim=16, feature_names=["f"], num_rows=5)
    return CCEEmbeddingBagCollection([CCEEmbeddingBagConfig(**{**settings, **kwargs})])


def test_another_format_is_refused(tmp_path):
    """Format 1 hashed ids otherwise."""
    (tmp_path / "manifest.json").write_text('{"format": 1}')
    with pytest.raises(ValueError, match=r"manifest.json has format 1; this version reads 2"):
        load_checkpoint(tmp_path, raw())


def test_raw_ids_keep_their_rows(tmp_path):
    save_checkpoint(tmp_path, raw(hash_ids=True), step=1)
    with pytest.raises(ValueError, match="hash_ids is True in the checkpoint, False in the model"):
        load_checkpoint(tmp_path, raw())
    with pytest.raises(ValueError, match="a larger table renumbers all raw ids"):
        load_checkpoint(tmp_path, raw(hash_ids=True, num_embeddings=60), grow=["t"])


def test_codes_of_another_type_are_refused():
    wide, narrow = raw(num_rows=300), raw()
    state = narrow.state_dict() | {"codes.t.codes": wide.state_dict()["codes.t.codes"]}
    with pytest.raises(ValueError, match=r"codes of torch.int16, the model of torch.uint8"):
        narrow.load_state_dict(state)
    assert narrow.codes["t"].codes.dtype == torch.uint8


@pytest.mark.parametrize(("clusterings", "past"), [(0, False), (2, True), (5, False)])
def test_a_run_is_finalised_from_its_last_clustering_on(tmp_path, clusterings, past):
    save_checkpoint(tmp_path, raw(), step=3)
    schedule = ClusteringSchedule(steps=frozenset(range(1, clusterings + 1)))
    run = SimpleNamespace(checkpoints=tmp_path, schedule=schedule)
    assert Trainer._past_last_clustering(run) is past
