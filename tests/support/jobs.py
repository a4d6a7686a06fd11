"""Training jobs that a checkpoint is made of: a model with a dense layer, and its optimizers."""

from __future__ import annotations

import numpy as np
import torch
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper

from cce_torchrec.clustering import ClusteringSchedule
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
