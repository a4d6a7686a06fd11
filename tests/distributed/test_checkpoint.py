"""Checkpoints: saved at one world size and plan, loaded at any other, or refused by name."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torchrec
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingCollection
from torchrec.distributed import DistributedModelParallel
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig, PoolingType
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper

from cce_torchrec import CCEEmbeddingBagCollection, CCEEmbeddingBagConfig, CCEEmbeddingCollection
from cce_torchrec.checkpoint import load_checkpoint, save_checkpoint
from cce_torchrec.checkpoint.optimizers import optimizer_states
from cce_torchrec.clustering import ClusteringSchedule, cluster
from cce_torchrec.distributed import state_dict
from cce_torchrec.distributed.data_parallel import data_parallel_parameters
from cce_torchrec.distributed.sharders import get_default_sharders
from cce_torchrec.planning import make_plan
from tests.support.ranks import run_ranks
from tests.distributed.test_sharded import CPU, batch, tables

OPTIMIZERS = {
    "rowwise": (torchrec.optim.RowWiseAdagrad, {"lr": 0.1, "eps": 1e-8}),
    "adagrad": (torch.optim.Adagrad, {"lr": 0.1, "eps": 1e-8}),
    "sgd": (torch.optim.SGD, {"lr": 0.1}),
}
SCHEDULE = ClusteringSchedule.evenly(100, 5)


class Net(nn.Module):
    """A dense layer over the embeddings."""

    @staticmethod
    def configs():
        return tables(PoolingType.SUM)

    def __init__(self, configs):
        super().__init__()
        self.collection = CCEEmbeddingBagCollection(tables=configs)
        width = sum(c.embedding_dim * len(c.feature_names) for c in configs)
        self.over = nn.Linear(width, 2)

    def forward(self, kjt):
        return self.over(self.collection(kjt).values())


class SequenceNet(nn.Module):
    """A dense layer over the embedding of every id."""

    @staticmethod
    def configs():
        shape = dict(num_embeddings=300, embedding_dim=16)
        return [
            CCEEmbeddingBagConfig(name="t", feature_names=["f", "g"], num_rows=5, **shape),
            EmbeddingConfig(name="p", feature_names=["h", "f"], **shape),
            CCEEmbeddingBagConfig(name="u", feature_names=["h"], num_rows=300, **shape),
        ]

    def __init__(self, configs):
        super().__init__()
        self.collection = CCEEmbeddingCollection(tables=configs)
        self.over = nn.Linear(16, 2)

    def forward(self, kjt):
        return self.over(torch.cat([part.values() for part in self.collection(kjt).values()]))


def build(kind, seed, optimizer="rowwise", configs=None, net=Net):
    """Model and the optimizer that its user steps; `kind` is tw, cw, rw, dp or unsharded."""
    torch.manual_seed(seed)
    configs = configs if configs is not None else net.configs()
    model = net(configs)
    cls, settings = OPTIMIZERS[optimizer]
    if kind != "dp":
        apply_optimizer_in_backward(cls, list(model.collection.parameters()), dict(settings))
    if kind != "unsharded":
        replicated = [config.name for config in configs] if kind == "dp" else []
        plan = make_plan(model, configs, CPU, kind.replace("dp", "tw"), data_parallel=replicated)
        model = DistributedModelParallel(
            model, device=CPU, plan=plan, sharders=get_default_sharders()
        )
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
    with torch.no_grad():
        return [model(batch(seed, False)).numpy().copy() for seed in (3, 4, 5)]


def save_all(rank, world_size, folder, kinds, optimizer, net):
    """Saves a trained and clustered job per kind; outputs at that point and one step later."""
    found = {}
    for number, kind in enumerate(kinds):
        model, own = build(kind, seed=10 * world_size + number, optimizer=optimizer, net=net)
        for seed in (1, 2):
            step(model, own, seed)
        cluster(model, optimizer=own)
        step(model, own, 6)
        where = f"{folder}/{kind} on {world_size}"
        save_checkpoint(where, model, step=3, optimizers=[own], schedule=SCHEDULE, extra={"a": 1})
        before = outputs(model)
        step(model, own, 7)
        found[where] = (optimizer, before, outputs(model))
    return found


def load_all(rank, world_size, kinds, saved, net):
    """Loads every checkpoint into every kind of model, over the last, and trains a step more."""
    for kind in kinds:
        built = {}
        for where, (optimizer, before, after) in saved.items():
            if optimizer not in built:
                built[optimizer] = build(kind, seed=100 + rank, optimizer=optimizer, net=net)
            model, own = built[optimizer]
            who = f"{where}, loaded as {kind} on {world_size}"
            report = load_checkpoint(where, model, optimizers=[own])
            assert (report.step, report.schedule, report.extra) == (3, SCHEDULE, {"a": 1}), who
            assert not [line for line in report.dropped if "random" not in line], report.dropped
            for a, b in zip(outputs(model), before, strict=True):
                assert np.array_equal(a, b), who
            step(model, own, 7)
            for a, b in zip(outputs(model), after, strict=True):
                # DDP averages equal gradients, which rounds; lost state shows in the second digit.
                np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5, err_msg=who)


def save_and_load(rank, world_size, folder, saving, loading, optimizer, saved, net=Net):
    """Codes are in several shards, cut elsewhere for each number of ranks."""
    state_dict.SHARD_BYTES = 100 * world_size
    found = save_all(rank, world_size, folder, saving, optimizer, net)
    load_all(rank, world_size, loading, {**saved, **found}, net)
    return found


def test_any_world_size_and_plan_to_any_other(tmp_path):
    """15 checkpoints, each into 15 kinds of job; on one rank spread is together."""
    alone, several = ["unsharded", "tw", "dp"], ["tw", "cw", "dp", "rw"]
    saved = {}
    for world_size, saving, loading in (
        (1, alone, []), (2, several, []), (3, several, []), (4, several, several),
        (3, [], several), (2, [], several), (1, [], alone),
    ):  # fmt: skip
        optimizer = "adagrad" if world_size == 3 else "rowwise"
        args = (str(tmp_path), saving, loading, optimizer, saved)
        saved |= run_ranks(world_size, save_and_load, *args)[0]
    assert len(saved) == 15


def test_sequences_of_any_world_size_and_plan(tmp_path):
    saved = {}
    for world_size, saving, loading in (
        (1, ["unsharded"], []), (3, ["tw"], []), (2, ["cw"], ["tw", "cw"]), (3, [], ["cw"]),
        (1, [], ["unsharded"]),
    ):  # fmt: skip
        args = (str(tmp_path), saving, loading, "rowwise", saved, SequenceNet)
        saved |= run_ranks(world_size, save_and_load, *args)[0]
    assert len(saved) == 3


def same_job(rank, world_size, folder):
    """Same ranks and plan: all state comes back bit for bit, and training goes on equal."""
    for net in (Net, SequenceNet):
        model, dense = build("cw", seed=rank, net=net)
        step(model, dense, 1)
        cluster(model)
        where = save_checkpoint(f"{folder}/{net.__name__}", model, step=1, optimizers=[dense])
        torch.rand(7)
        expected = torch.rand(3)
        torch.manual_seed(0)
        other, other_dense = build("cw", seed=50 + rank, net=net)
        for group in other_dense.param_groups:
            group["lr"] = 9.0
        load_checkpoint(where, other, optimizers=[other_dense])
        assert other_dense.param_groups[0]["lr"] == 0.05
        torch.rand(7)
        assert torch.equal(torch.rand(3), expected)
        for last in (False, True):
            states = [optimizer_states(m, [d]) for m, d in ((model, dense), (other, other_dense))]
            assert states[0].keys() == states[1].keys()
            for name, one in states[0].items():
                for key, value in one.tensors.items():
                    pair = [value, states[1][name].tensors[key]]
                    shards = [
                        [s.tensor for s in t.local_shards()] if hasattr(t, "local_shards") else [t]
                        for t in pair
                    ]
                    for a, b in zip(*shards, strict=True):
                        assert torch.equal(a, b), (name, key)
            for a, b in zip(outputs(model), outputs(other), strict=True):
                assert np.array_equal(a, b)
            for m, d in ((model, dense), (other, other_dense)) if not last else ():
                step(m, d, 8)
                cluster(m)


def test_same_ranks_and_plan_is_bit_equal(tmp_path):
    run_ranks(2, same_job, str(tmp_path))


def shards_of_codes(rank, world_size):
    """Shards are no larger than asked for, views where they can be, and found again by offset."""
    found = {}
    for most in (40, 300, 1 << 20):
        state_dict.SHARD_BYTES = most
        for kind in ("tw", "cw", "rw"):
            model, _ = build(kind, seed=rank)
            codes = {name: part.codes for name, part in model.module.collection.codes.items()}
            state = model.state_dict()
            pieces = 0
            for name, held in codes.items():
                shards = state[f"collection.codes.{name}.codes"].local_shards()
                pieces += len(shards)
                inside = range(held.data_ptr(), held.data_ptr() + held.nbytes)
                assert all(shard.tensor.data_ptr() in inside for shard in shards) or kind == "cw"
                for shard in shards:
                    assert shard.tensor.nbytes <= most or len(shard.tensor) == 1
            before = {name: held.clone() for name, held in codes.items()}
            elsewhere, again = copy.deepcopy(state), copy.deepcopy(state)
            model.load_state_dict(state)
            for held in codes.values():
                held.zero_()
            model.load_state_dict(elsewhere)
            for name, held in codes.items():
                assert torch.equal(held, before[name]) and (not rank or held.any())
            found[most, kind] = pieces
    state_dict.SHARD_BYTES = 100
    with pytest.raises(ValueError, match="the state dict is of another plan"):
        model.load_state_dict(again)
    return found


def test_codes_are_saved_in_shards(tmp_path):
    for found in run_ranks(2, shards_of_codes):
        for kind in ("tw", "cw", "rw"):
            assert found[40, kind] > found[300, kind] > found[1 << 20, kind], found


class Plain(nn.Module):
    """TorchRec's own collections, beside which CCE ones live in a model."""

    def __init__(self):
        super().__init__()
        self.bags = EmbeddingBagCollection(tables=self.configs()[:1])
        self.rows = EmbeddingCollection(tables=self.configs()[1:])

    @staticmethod
    def configs():
        shape = dict(num_embeddings=50, embedding_dim=8)
        return [
            EmbeddingBagConfig(name="t", feature_names=["f"], **shape),
            EmbeddingConfig(name="e", feature_names=["g"], **shape),
        ]


def plain_collections(rank, world_size, folder):
    """Saved under DistributedModelParallel, loaded without it."""

    def made():
        model = Plain()
        cls, settings = OPTIMIZERS["rowwise"]
        apply_optimizer_in_backward(cls, list(model.parameters()), dict(settings))
        return model

    model, other = made(), made()
    plan = make_plan(model, Plain.configs(), CPU, "tw")
    model = DistributedModelParallel(model, device=CPU, plan=plan, sharders=get_default_sharders())
    save_checkpoint(folder, model, step=1)
    report = load_checkpoint(folder, other)
    assert report.tables == ["bags.t", "rows.e"] and report.dropped == []
    for name, value in model.state_dict().items():
        for shard in value.local_shards():
            assert torch.equal(shard.tensor, other.state_dict()[name])


def test_plain_collections(tmp_path):
    run_ranks(2, plain_collections, str(tmp_path))
