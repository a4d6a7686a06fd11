"""Tables whose ids are shared out among ranks: the same measures as in one process."""

import pytest
import torch

from cce_torchrec import cluster
from cce_torchrec.alignment.activations import align_activations
from cce_torchrec.alignment.agreement import CodeCounts, adjusted_mutual_information
from cce_torchrec.alignment.linear import debiased_cka, linear_cka, mean_cca, procrustes_distance
from cce_torchrec.alignment.live import LiveTable
from cce_torchrec.alignment.moments import Moments, moments
from cce_torchrec.alignment.neighbours import neighbourhoods
from cce_torchrec.alignment.tables import Weight, align
from tests.support.models import SUM, Model, collection, shard, tables
from tests.support.ranks import on_ranks
from tests.support.twins import copy_state
from tests.unit.test_alignment import pair

MEASURES = [linear_cka, debiased_cka, procrustes_distance, mean_cca]


@on_ranks(1, 2, 3)
def test_sums_of_ranks_are_those_of_one_process(rank, world_size):
    x, y = pair(500)
    at = torch.arange(500)[rank::world_size]
    found = moments((x[part], y[part]) for part in at.split(40))
    alone = moments([(x, y)] if rank == 0 else [])  # the others have no ids
    assert found.ids == alone.ids == 500
    for measure in MEASURES:
        assert measure(found) == pytest.approx(measure(alone), rel=1e-10)
        assert measure(alone) == pytest.approx(measure(Moments.of(x, y)), rel=1e-10)


@on_ranks(1, 2, 3)
def test_tables_and_codes(rank, world_size):
    x, y = pair(900)
    found = align(Weight(x), Weight(y), k=3, sample=40)
    x_alone = moments([(x, y)] if rank == 0 else [])
    assert found.linear_cka.value == pytest.approx(linear_cka(x_alone), rel=1e-10)
    assert found.debiased_cka.value == pytest.approx(debiased_cka(x_alone), rel=1e-9)
    g = torch.Generator().manual_seed(0)
    codes = [torch.randint(0, 7, (900,), generator=g) for _ in range(2)]
    whole, own = CodeCounts((7, 7)), CodeCounts((7, 7))
    whole.add(*codes)
    own.add(*(part[rank::world_size] for part in codes))
    expected = adjusted_mutual_information(whole)
    assert adjusted_mutual_information(own.of_all_ranks()) == pytest.approx(expected, rel=1e-10)


@on_ranks(1, 2, 3)
def test_activations_of_the_batches_of_all_ranks(rank, world_size):
    torch.manual_seed(0)
    a, b = torch.nn.Linear(5, 4).double(), torch.nn.Linear(5, 6).double()
    batches = torch.randn(12, 20, 5, dtype=torch.float64)
    found = align_activations(a, b, batches[rank::world_size], k=3)
    x, y = (model(batches.flatten(0, 1)).detach() for model in (a, b))
    assert found.ids == 240
    for measure in MEASURES:
        value = getattr(found, measure.__name__).value
        assert value == pytest.approx(measure(Moments.of(x, y)), rel=1e-10)
    expected = neighbourhoods(x, y, 3)
    assert found.neighbours.overlap.value == pytest.approx(expected.overlap.value, rel=1e-10)
    with pytest.raises(ValueError, match="the models give 20 and 7 examples"):
        align_activations(
            a, b, batches[rank::world_size],
            forward=lambda m, x: m(x[:7] if m is b and rank == world_size - 1 else x),
        )  # fmt: skip


@on_ranks(2, 3)
def test_what_fails_on_one_rank_is_said_on_all(rank, world_size):
    x, y = pair(90)
    with pytest.raises(ValueError, match=r"^rank 1: the vectors are of 90 and of 89 ids"):
        moments([(x, y[1:] if rank == 1 else y)])
    with pytest.raises(ValueError, match="not finite"):
        moments([(x * float("nan") if rank == 1 else x, y)])
    with pytest.raises(ValueError, match=r"^alignment is one of two .* there are none"):
        moments([])


@on_ranks(1, 2, 3)
@pytest.mark.parametrize("kind", ["tw", "cw", "rw"])
def test_tables_of_a_sharded_model(rank, world_size, kind):
    torch.manual_seed(0)
    configs = tables(SUM)
    models = [shard(Model(collection(configs)), configs, kind) for _ in range(2)]
    cluster(models[1])
    sharded, plain = [model.module.collection for model in models], []
    for own in sharded:
        plain.append(collection(configs))
        copy_state(own, plain[-1])
    with pytest.raises(ValueError, match="'h' is read by table 'p' too, which has 40 ids of 1,000"):
        LiveTable(sharded[0], configs, "u")
    names = [config.name for config in configs if config.name != "u"]
    expected = [align(*(LiveTable(own, configs, name) for own in plain), k=3) for name in names]
    for name, alone in zip(names, expected, strict=True):
        found = align(*(LiveTable(own, configs, name) for own in sharded), k=3)
        for measure in ("linear_cka", "debiased_cka", "procrustes_distance", "mean_cca", "svcca"):
            value = getattr(alone, measure).value
            assert getattr(found, measure).value == pytest.approx(value, rel=1e-10, abs=1e-10)
        for measure in ("overlap", "imbalance", "imbalance_back"):
            value = getattr(alone.neighbours, measure).value
            assert getattr(found.neighbours, measure).value == pytest.approx(value, rel=1e-10)
    with pytest.raises(ValueError, match=r"no table 'x'; there are"):
        LiveTable(sharded[0], configs, "x")
