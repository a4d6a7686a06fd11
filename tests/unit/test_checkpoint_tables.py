"""Tables of a checkpoint against those of a model."""

import pytest
import torch

from cce_torchrec import CCEEmbeddingBagCollection, CCEEmbeddingBagConfig
from cce_torchrec.checkpoint import load_checkpoint, save_checkpoint


def raw(**kwargs):
    settings = dict(name="t", num_embeddings=50, embedding_dim=16, feature_names=["f"], num_rows=5)
    return CCEEmbeddingBagCollection([CCEEmbeddingBagConfig(**{**settings, **kwargs})])


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
