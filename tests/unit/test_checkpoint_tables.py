"""Tables of a checkpoint against those of a model."""

import copy

import pytest
import torch
from torch import nn

from cce_torchrec import CCEEmbeddingBagCollection, CCEEmbeddingBagConfig
from cce_torchrec.checkpoint import load_checkpoint, save_checkpoint
from cce_torchrec.clustering import finalize
from cce_torchrec.distributed.state_dict import CodesState, Part
from cce_torchrec.distributed.table_placement import TablePlacement


def raw(**kwargs):
    settings = dict(name="t", num_embeddings=50, embedding_dim=16, feature_names=["f"], num_rows=5)
    return CCEEmbeddingBagCollection([CCEEmbeddingBagConfig(**{**settings, **kwargs})])


def test_another_format_is_refused(tmp_path):
    """Format 1 hashed ids otherwise."""
    (tmp_path / "manifest.json").write_text('{"format": 1}')
    with pytest.raises(ValueError, match=r"has format 1; this version reads 2, 3 and 4"):
        load_checkpoint(tmp_path, raw())


def test_raw_ids_keep_their_rows(tmp_path):
    save_checkpoint(tmp_path, raw(hash_ids=True), step=1)
    with pytest.raises(ValueError, match="hash_ids is True in the checkpoint, False in the model"):
        load_checkpoint(tmp_path, raw())
    with pytest.raises(ValueError, match="a larger table renumbers all raw ids"):
        load_checkpoint(tmp_path, raw(hash_ids=True, num_embeddings=60), grow=["t"])


def test_codes_of_other_bits_are_refused():
    wide, narrow = raw(num_rows=300), raw()
    state = narrow.state_dict() | {"codes.t.codes": wide.state_dict()["codes.t.codes"]}
    with pytest.raises(ValueError, match=r"\[13, 20\] in 'codes.t.codes', the model \[7, 12\]"):
        narrow.load_state_dict(state)
    assert narrow.codes["t"].packing.bits == 3


@pytest.mark.parametrize("learned_codes", [True, False])
@pytest.mark.parametrize("num_rows", [5, 100])  # of 3 bits or 8, and more once finalized
def test_state_of_other_main_and_helper_rows_is_refused(num_rows, learned_codes):
    """Shapes are equal: only the number of helper rows tells."""
    tables = [
        raw(num_rows=rows, num_helper_rows=helper, learned_codes=learned_codes)
        for rows, helper in ((1, 3), (2, 2), (4, 0))
        for rows, helper in [(rows * num_rows, helper * num_rows)]
    ]
    for saved in tables:
        for table in tables:
            if saved is table:
                table.load_state_dict(saved.state_dict())
                continue
            before = {key: value.clone() for key, value in table.state_dict().items()}
            there, here = (t.embedding_bag_configs()[0].helper_rows for t in (saved, table))
            with pytest.raises(ValueError, match=f"{there} helper rows, the model {here}; conf"):
                table.load_state_dict(saved.state_dict())
            assert all(torch.equal(v, before[k]) for k, v in table.state_dict().items())


def test_finalized_state_loads_into_the_finalized_table_alone():
    table, config = raw(), raw().embedding_bag_configs()[0]
    finalize(table)
    copy.deepcopy(CCEEmbeddingBagCollection([config.finalized()])).load_state_dict(
        table.state_dict()
    )
    with pytest.raises(ValueError, match=r"table 't': the checkpoint has 0 helper rows.* 15"):
        raw().load_state_dict(table.state_dict())
    with pytest.raises(ValueError, match=r"table 't': the checkpoint has 15 helper rows.* 0;"):
        table.load_state_dict(raw().state_dict())
    state = raw().state_dict()
    del state["codes.t.num_helper_rows"]
    with pytest.raises(RuntimeError, match=r'Missing key.* "codes.t.num_helper_rows"'):
        raw().load_state_dict(state)
    raw().load_state_dict(state, strict=False)


def test_a_table_that_the_checkpoint_lacks_is_named(tmp_path):
    save_checkpoint(tmp_path, raw(), step=1)
    with pytest.raises(ValueError, match=r"table 'u': the model has .*; tables=\[...\] names it"):
        load_checkpoint(tmp_path, raw(name="u"), tables=["u"])


def test_shards_name_the_device_that_holds_them(monkeypatch):
    nothing = TablePlacement.from_plan([], {})
    state = CodesState(nn.ModuleDict(), [], nothing, 9, torch.device("cpu"), None)

    def placement(owner):
        return str(state._shard(Part(owner, range(8), range(4)), [0, 0], [8, 4]).placement)

    assert placement(9) == "rank:9/cpu"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    state._device = torch.device("cuda", 1)
    assert placement(9) == "rank:9/cuda:1" and placement(18) == "rank:18/cuda:2"
