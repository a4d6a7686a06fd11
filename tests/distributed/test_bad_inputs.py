"""Batches that do not fit together under sharding: refused by name, the first on every rank."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torchrec import KeyedJaggedTensor

from tests.support.bad_inputs import BAD, VARIABLE, WEIGHTED, made, tensor_dict
from tests.support.models import KEYS, SUM, batch, sharded_sequences, sharded_tables
from tests.support.ranks import on_ranks
from tests.support.twins import Pair, flat


def refused(model, says, bad, usual, rank):
    """By every rank, as the first batch of rank 0 and as a later one of all."""
    with pytest.raises(ValueError, match=says):
        model(bad if rank == 0 else usual)
    model(usual).wait()  # a model that has refused a batch takes the next
    with pytest.raises(ValueError, match=says):
        model(bad)


@on_ranks(1, 2)
@pytest.mark.parametrize("fault", BAD | VARIABLE)
def test_refused(rank, world_size, fault):
    make, says = (BAD | VARIABLE)[fault]
    refused(sharded_tables(), says, make(), batch(rank, False), rank)


# The same check for every plan and collection: some faults show that it is there.
SOME = ["a length beyond the values", "offsets that do not rise", "a feature twice", "float ids"]


@on_ranks(2)
@pytest.mark.parametrize(
    "make_model", [partial(sharded_tables, "rw"), sharded_sequences], ids=["rw", "sequence"]
)
@pytest.mark.parametrize("fault", SOME)
def test_refused_elsewhere(rank, world_size, fault, make_model):
    make, says = BAD[fault]
    refused(make_model(), says, make(), batch(rank, False), rank)


@on_ranks(2)
@pytest.mark.parametrize("fault", WEIGHTED)
def test_weights_refused(rank, world_size, fault):
    make, says = WEIGHTED[fault]
    refused(sharded_tables(is_weighted=True), says, make(), batch(rank, True), rank)


@on_ranks(1, 2)
def test_values_beyond_the_last_bag(rank, world_size):
    """Refused in the first batch, as TorchRec does it, and left out of later ones."""
    usual = batch(rank, False)
    beyond = KeyedJaggedTensor(
        KEYS, torch.cat([usual.values(), torch.tensor([7, -1])]), lengths=usual.lengths()
    )
    for model in (sharded_tables(), sharded_sequences()):
        with pytest.raises(ValueError, match="Sum of lengths must equal the number of values"):
            model(beyond)
        expected = flat(model(usual).wait())
        assert torch.equal(flat(model(beyond).wait()), expected)
        assert model.module.collection.num_invalid_ids == 0


@on_ranks(1, 2)
@pytest.mark.parametrize("kind", ["tw", "rw"])
def test_short_ids_and_tensor_dicts(rank, world_size, kind):
    """Ids of any integer type, and a TensorDict: as in the unsharded module."""
    pair = Pair(kind, (), SUM, False)
    pair.copy()
    ids = torch.arange(len(batch(0, False).values())).remainder(2)
    expected = pair.module(made(values=ids)).values()
    for dtype in (torch.int16, torch.uint8, torch.int8, torch.bool, torch.int32):
        out = pair.model(made(values=ids.to(dtype))).wait().values()
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    kjt = batch(rank, False)
    out = pair.model(tensor_dict(kjt)).wait().values()
    torch.testing.assert_close(out, pair.module(kjt).values(), rtol=1e-5, atol=1e-6)
