"""Batches that do not fit together under sharding: refused by name, on every rank."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torchrec import KeyedJaggedTensor
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from tests.support.bad_inputs import BAD, VARIABLE, WEIGHTED, made, tensor_dict
from tests.support.models import (
    CPU,
    KEYS,
    MEAN,
    SUM,
    Batch,
    Loss,
    Model,
    batch,
    collection,
    shard,
    sharded_sequences,
    sharded_tables,
    tables,
    vbe_batch,
)
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


def typed(kjt, ids, bags, weights=None):
    """`kjt` in other types."""
    given = kjt.weights_or_none()
    return KeyedJaggedTensor(
        KEYS, kjt.values().to(ids), lengths=kjt.lengths().to(bags),
        weights=None if given is None else given.to(weights),
    )  # fmt: skip


SHORT, LONG = torch.int32, torch.int64
TYPES = {
    "ids": ((SHORT, LONG), (LONG, LONG)),
    "lengths": ((LONG, SHORT), (LONG, LONG)),
    "ids and lengths": ((SHORT, LONG), (torch.uint8, SHORT)),
}
"""Of the ids and lengths of rank 0, and of the others."""


@on_ranks(2)
@pytest.mark.parametrize("kind", ["tw", "rw"])
@pytest.mark.parametrize("what", TYPES)
def test_ranks_with_other_types(rank, world_size, what, kind):
    """gloo would end the process, or ids be read from memory that nobody wrote."""
    pair = Pair(kind, (), SUM, False)
    pair.copy()
    usual, types = batch(rank, False), TYPES[what]
    expected = pair.module(usual).values()
    for own in (types[min(rank, 1)], types[1 - min(rank, 1)]):  # as a first batch, and a later one
        out = pair.model(typed(usual, *own)).wait().values()
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


@on_ranks(2)
@pytest.mark.parametrize("weights", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_ranks_with_other_weights(rank, world_size, weights):
    pair = Pair("tw", (), SUM, True)
    pair.copy()
    usual = typed(batch(rank, True), LONG, LONG, weights if rank == 0 else torch.float32)
    rounded = typed(usual, LONG, LONG, torch.float32)
    out = pair.model(usual).wait().values()
    torch.testing.assert_close(out, pair.module(rounded).values(), rtol=1e-5, atol=1e-6)


@on_ranks(2)
def test_ids_beyond_the_first_type(rank, world_size):
    model = sharded_tables()
    model(typed(batch(rank, False), SHORT, LONG)).wait()
    ids = batch(rank, False).values().clone()
    ids[0] = 2**31
    with pytest.raises(
        ValueError, match=r"'f' \(table 't', 'p'\).* int32 .* now there is 21474836"
    ):
        model(made(rank, values=ids))


@on_ranks(2)
def test_a_batch_size_per_feature_on_some_ranks(rank, world_size):
    model = sharded_tables()
    with pytest.raises(
        ValueError, match=r"1 of 2 ranks have a batch size per feature for features"
    ):
        model(vbe_batch(rank, False) if rank else batch(rank, False))
    model(vbe_batch(rank, False)).wait()


def cut_plain():
    """A plain table cut by rows beside CCE tables that are whole."""
    return shard(Model(collection(tables(SUM))), tables(SUM), "tw", row_wise=["p"])


OTHER = "another rank has refused its batch|the batch of ranks .* could not be looked up"


@on_ranks(2, 3)
@pytest.mark.parametrize(
    "make_model",
    [
        sharded_tables,
        partial(sharded_tables, "cw"),
        partial(sharded_tables, "rw"),
        cut_plain,
        sharded_sequences,
    ],
    ids=["tw", "cw", "rw", "cut", "sequence"],
)
def test_a_later_batch_of_one_rank_is_refused_on_all(rank, world_size, make_model):
    """Told in place of its ids, so that the ranks stay in step: those that go on do so together."""
    model, usual = make_model(), typed(batch(rank, False), SHORT, LONG)
    expected = flat(model(usual).wait())
    for fault in SOME:
        with pytest.raises(ValueError, match=BAD[fault][1] if rank == 1 else OTHER):
            model(BAD[fault][0]() if rank == 1 else usual)
        assert torch.equal(flat(model(usual).wait()), expected)


@on_ranks(2)
def test_a_later_batch_of_one_rank_is_refused_with_weights(rank, world_size):
    model, usual = sharded_tables(is_weighted=True), batch(rank, True)
    expected = flat(model(usual).wait())
    make, says = WEIGHTED["fewer weights"]
    with pytest.raises(ValueError, match=says if rank == 0 else OTHER):
        model(make() if rank == 0 else usual)
    assert torch.equal(flat(model(usual).wait()), expected)


@on_ranks(2)
@pytest.mark.parametrize("kind", ["tw", "rw"])
def test_a_later_batch_of_one_rank_is_refused_in_a_pipeline(rank, world_size, kind):
    """Its ids are exchanged with those of other modules, and looked up a step later."""
    model = shard(Loss(), tables(MEAN), kind)
    optimizer = torch.optim.SGD(model.module.over.parameters(), lr=0.1)
    pipeline = TrainPipelineSparseDist(model, optimizer, CPU)
    make, says = BAD["a length beyond the values"]
    batches = [Batch(batch(rank, False)) for _ in range(3)]
    batches.append(Batch(make()) if rank == 0 else batches[0])
    with pytest.raises(ValueError, match=says if rank == 0 else OTHER):
        data = iter(batches)
        while True:
            pipeline.progress(data)
