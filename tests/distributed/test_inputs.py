"""Every plan with every kind of input, on 1 to 4 ranks: equal to the unsharded module."""

from __future__ import annotations

import pytest

from tests.support.models import MEAN, SUM, batch, vbe_batch
from tests.support.ranks import on_ranks
from tests.support.twins import Pair

PLANS = {
    "together": ("tw", ()),
    "spread": ("cw", ()),
    "spread over a host": ("tcw", ()),
    "data-parallel": ("tw", ("t", "u", "p")),
    "mixed": ("cw", ("u",)),  # t spread, u on every rank, p together
    "codes spread": ("rw", ()),
    "codes and rows spread": ("rw, plain ones too", ()),
    "codes spread, mixed": ("rw", ("u",)),
}
WITHOUT_VBE = [name for name, (_, own) in PLANS.items() if own] + ["codes and rows spread"]
CASES = [(plan, batch) for plan in PLANS]
CASES += [(plan, vbe_batch) for plan in PLANS if plan not in WITHOUT_VBE]


every_case = pytest.mark.parametrize(
    ("plan", "make"), CASES, ids=[f"{plan}-{make.__name__}" for plan, make in CASES]
)


@on_ranks(1, 2)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("pooling", [SUM, MEAN], ids=["sum", "mean"])
@every_case
def test_sharded_equals_unsharded(rank, world_size, plan, make, pooling, weighted):
    check(world_size, plan, make, pooling, weighted)


@on_ranks(3, 4)
@every_case
def test_more_ranks(rank, world_size, plan, make):
    check(world_size, plan, make, MEAN, weighted=True)


def check(world_size, plan, make, pooling, weighted):
    kind, data_parallel = PLANS[plan]
    pair = Pair(kind, data_parallel, pooling, weighted)
    owners = [len(set(ranks)) for ranks in pair.sharded.chunk_owners.values()]
    assert (max(owners, default=1) > 1) == (kind != "tw" and world_size > 1)
    ids = [len(part.ids) for part in pair.sharded.codes.values()]
    assert kind[:2] != "rw" or min(ids) < 300 or world_size == 1
    assert list(pair.plain(make(0, weighted)).keys()) == ["f@t", "g", "h@p", "f@p", "h@u"]
    pair.check(make)


@on_ranks(1, 2)
@pytest.mark.parametrize("plan", WITHOUT_VBE)
def test_batch_sizes_per_feature_are_refused(rank, world_size, plan):
    pair = Pair(*PLANS[plan], SUM, False)
    why = "are data-parallel, for which TorchRec has|are cut by rows, for which gloo"
    with pytest.raises(ValueError, match=why):
        pair.model(vbe_batch(rank, False))
