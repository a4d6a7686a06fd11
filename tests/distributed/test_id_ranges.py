"""Features with ids of their own in one table, under every plan: equal to the unsharded module."""

from __future__ import annotations

from unittest import mock

import pytest
import torch.distributed as dist

from cce_torchrec import CCEEmbeddingBagCollection
from cce_torchrec.checkpoint import load_checkpoint, save_checkpoint
from cce_torchrec.lookup import bounds
from tests.distributed.test_inputs import CASES, PLANS
from tests.support.models import MEAN, SUM, batch, tables
from tests.support.ranks import on_ranks
from tests.support.twins import Pair, compare

# Every plan, and both kinds of batches; test_inputs.py has all pairs of them without ranges.
ONCE = {plan: make for plan, make in CASES if plan not in ("together", "codes spread")}
ONCE |= {"together": batch, "codes spread": batch}
ORDER = ["h@u", "g", "f@p", "f@t", "h@p"]


def made(pooling=SUM, weighted=False, order=None, **settings):
    configs = tables(pooling)
    shape = {**vars(configs[0]), "id_ranges": {"f": range(200, 300), "g": range(3, 150)}}
    shape |= {"rotate_chunks": True} | settings
    del shape["has_custom_init"], shape["init_fn"]
    configs[0] = type(configs[0])(**shape)
    return CCEEmbeddingBagCollection(configs, is_weighted=weighted, output_order=order)


@on_ranks(2)
@pytest.mark.parametrize(("plan", "make"), [*ONCE.items()], ids=[*ONCE])
def test_sharded_equals_unsharded(rank, world_size, plan, make):
    kind, data_parallel = PLANS[plan]
    pair = Pair(kind, data_parallel, MEAN, True, make=lambda: made(MEAN, True, ORDER))
    pair.check(make)
    assert list(pair.plain(make(0, True)).keys()) == ORDER
    # "f" is read by the plain table too, whose ids are its own.
    assert pair.sharded.num_invalid_ids == 0


@on_ranks(2)
@pytest.mark.parametrize("plan", ["spread", "codes spread"])
def test_notes_of_ids_are_those_of_one_process(rank, world_size, plan):
    settings = dict(recipe="rare", num_rows=2, hash_ids=plan == "spread")
    pair = Pair(*PLANS[plan], SUM, False, make=lambda: made(**settings))
    pair.check(batch)


@on_ranks(2)
@pytest.mark.parametrize("plan", ["spread", "codes spread"])
def test_a_bad_id_is_told_by_its_feature(rank, world_size, plan):
    pair = Pair(*PLANS[plan], SUM, False, make=made)
    kjt = batch(rank, False)
    kjt.values()[:] = 120  # beyond the 100 ids of "f" alone
    with mock.patch.object(bounds.logger, "warning") as warning:
        pair.model(kjt).wait()
    every: list = [None] * world_size
    dist.all_gather_object(every, [call.args[1] for call in warning.call_args_list])
    of_table = {text for texts in every for text in texts if "table 't'" in text}
    assert len(of_table) > 0
    assert all("'f': id 120 is outside [0, 100)" in text for text in of_table)


@on_ranks(2)
def test_a_checkpoint_of_one_plan_in_another(rank, world_size, tmp_path):
    pair = Pair(*PLANS["codes spread"], SUM, False, make=made)
    pair.check(batch)
    save_checkpoint(tmp_path, pair.model, step=1)
    other = Pair(*PLANS["spread"], SUM, False, make=made)
    load_checkpoint(tmp_path, other.model)
    pair.copy()
    compare(other.sharded, pair.plain, exact=True)
