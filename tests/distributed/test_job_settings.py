"""What a job may set for all of torch, or do to a module: sharded lookups train all the same."""

from __future__ import annotations

import contextlib

import pytest
import torch

from cce_torchrec.clustering import cluster
from tests.support.models import batch, sharded_sequences, sharded_tables, vbe_batch
from tests.support.ranks import on_ranks
from tests.support.twins import flat


@contextlib.contextmanager
def default_dtype(dtype):
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(usual)


@contextlib.contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


SETTINGS = {
    "bfloat16 by default": lambda: default_dtype(torch.bfloat16),
    "float16 by default": lambda: default_dtype(torch.float16),
    "float64 by default": lambda: default_dtype(torch.float64),
    "meta by default": lambda: default_device("meta"),
    "deterministic": deterministic,
}


def steps(model, batches):
    """Outputs of training steps with a clustering step after each."""
    out = []
    for features in batches:
        out.append(flat(model(features).wait()))
        out[-1].square().sum().backward()
        cluster(model)
    return [o.detach() for o in out]


@on_ranks(1, 2)
@pytest.mark.parametrize("kind", ["tw", "rw"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_trains_as_without(rank, world_size, setting, kind):
    """The module was built before, as modules under another default have other weights."""
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(sharded_tables(kind))
    batches = [batch(10 * seed + rank, False) for seed in range(2)]
    expected = steps(models[0], batches)
    with SETTINGS[setting]():
        got = steps(models[1], batches)
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)


@on_ranks(1)
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_model_that_is_built_so_trains(rank, world_size, setting):
    batches = [batch(seed, False) for seed in range(2)]
    with SETTINGS[setting]():
        model = sharded_tables(device="cpu")
        outputs = steps(model, batches)
    assert all(out.dtype == torch.float32 and out.isfinite().all() for out in outputs)


@on_ranks(1, 2)
@pytest.mark.parametrize("kind", ["tw", "cw", "rw"])
def test_inference_mode(rank, world_size, kind):
    model = sharded_tables(kind)
    features = batch(rank, False)
    with torch.no_grad():
        expected = model(features).wait().values()
    with torch.inference_mode():
        out = model(features).wait().values()
        assert torch.equal(out, expected)
        made = batch(rank, False)  # of inference tensors
        assert torch.equal(model(made).wait().values(), expected)
    model(features).wait().values().sum().backward()
    assert not torch.equal(model(features).wait().values(), expected)


@on_ranks(1, 2)
@pytest.mark.parametrize("kind", ["tw", "cw"])
def test_inference_mode_of_a_batch_size_per_feature(rank, world_size, kind):
    model = sharded_tables(kind)
    features = vbe_batch(rank, False)
    with torch.no_grad():
        expected = model(features).wait().values()
    with torch.inference_mode():
        assert torch.equal(model(features).wait().values(), expected)


@on_ranks(1, 2)
def test_inference_mode_of_sequences(rank, world_size):
    model = sharded_sequences()
    features = batch(rank, False)
    with torch.no_grad():
        expected = flat(model(features).wait())
    with torch.inference_mode():
        assert torch.equal(flat(model(features).wait()), expected)


@on_ranks(1)
@pytest.mark.parametrize("conversion", ["half", "bfloat16", "double"])
def test_converted_modules_keep_their_tables(rank, world_size, conversion):
    """TorchRec's sharded tables stay in float32, whatever the module around them becomes."""
    torch.manual_seed(0)
    models = [sharded_tables() for _ in range(2)]
    models[1].module.load_state_dict(models[0].module.state_dict())
    getattr(models[1], conversion)()
    batches = [batch(seed, False) for seed in range(2)]
    expected, got = steps(models[0], batches), steps(models[1], batches)
    assert all(torch.equal(one, other) for one, other in zip(expected, got, strict=True))


@on_ranks(1)
def test_assigned_weights_are_refused(rank, world_size):
    """TorchRec's lookups would go on with those of before, without a word."""
    model = sharded_tables()
    state = model.module.state_dict()
    with pytest.raises(ValueError, match=r"tables \['t', 'p', 'u'\]: .*assign=True.*leave assign"):
        model.module.load_state_dict(state, assign=True)
    model.module.load_state_dict(state)
