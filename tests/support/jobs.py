"""Training jobs that a checkpoint is made of: a model with a dense layer, and its optimizers."""

from __future__ import annotations

from unittest import mock

import numpy as np
import torch
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper

from cce_torchrec.checkpoint import load_checkpoint
from cce_torchrec.clustering import ClusteringSchedule
from cce_torchrec.distributed import state_dict
from cce_torchrec.distributed.data_parallel import data_parallel_parameters
from tests.support.models import ROWWISE, SGD, Net, batch, shard, with_optimizer

OPTIMIZERS = {
    "rowwise": ROWWISE,
    "adagrad": (torch.optim.Adagrad, {"lr": 0.1, "eps": 1e-8}),
    "sgd": SGD,
}
SCHEDULE = ClusteringSchedule.evenly(100, 5)


def build(kind, seed, optimizer="rowwise", configs=None, net=Net):
    """Model and the optimizer that its user steps; `kind` is tw, cw, rw, dp or unsharded."""
    torch.manual_seed(seed)
    configs = configs if configs is not None else net.configs()
    model = net(configs)
    cls, settings = OPTIMIZERS[optimizer]
    if kind != "dp":
        with_optimizer(model.collection, OPTIMIZERS[optimizer])
    if kind != "unsharded":
        replicated = [config.name for config in configs] if kind == "dp" else []
        model = shard(model, configs, kind.replace("dp", "tw"), data_parallel=replicated)
    over = {name: p for name, p in model.named_parameters() if "over" in name}
    if kind != "dp":
        return model, torch.optim.Adam(over.values(), lr=0.05)
    own = KeyedOptimizerWrapper(data_parallel_parameters(model), lambda p: cls(p, **settings))
    dense = KeyedOptimizerWrapper(over, lambda p: torch.optim.Adam(p, lr=0.05))
    return model, CombinedOptimizer([("tables", own), ("dense", dense)])


def step(model, dense, seed):
    """One step on a batch that every rank has, so that any number of them does the same."""
    out = model(batch(seed, False))
    dense.zero_grad()
    out.square().sum().backward()
    dense.step()


def outputs(model):
    """Of three batches, as numpy arrays: tensors would die with the rank that returns them."""
    with torch.no_grad():
        return [model(batch(seed, False)).numpy().copy() for seed in (3, 4, 5)]


def assert_same_outputs(model, expected):
    """Bit for bit."""
    for a, b in zip(outputs(model), expected, strict=True):
        assert np.array_equal(a, b)


def small_shards(world_size):
    """Codes are in several shards, cut elsewhere for each number of ranks."""
    return mock.patch.object(state_dict, "SHARD_BYTES", 100 * world_size)


def load_jobs(rank, world_size, kind, saved, net=Net):
    """Loads every checkpoint into a model, over the last, and trains a step more."""
    built = {}
    for where, (optimizer, before, after) in saved.items():
        if optimizer not in built:
            built[optimizer] = build(kind, seed=100 + rank, optimizer=optimizer, net=net)
        model, own = built[optimizer]
        with small_shards(world_size):
            report = load_checkpoint(where, model, optimizers=[own])
        assert (report.step, report.schedule, report.extra) == (3, SCHEDULE, {"a": 1}), where
        assert not [line for line in report.dropped if "random" not in line], report.dropped
        for a, b in zip(outputs(model), before, strict=True):
            assert np.array_equal(a, b), where
        step(model, own, 7)
        for a, b in zip(outputs(model), after, strict=True):
            # DDP averages equal gradients, which rounds; lost state shows in the second digit.
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5, err_msg=where)
