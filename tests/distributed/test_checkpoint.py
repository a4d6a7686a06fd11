"""Checkpoints: saved at one world size and plan, loaded at any other, or refused by name."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingCollection
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig

from cce_torchrec import CCEEmbeddingBagConfig
from cce_torchrec.checkpoint import load_checkpoint, save_checkpoint
from cce_torchrec.checkpoint.optimizers import optimizer_states
from cce_torchrec.clustering import cluster
from cce_torchrec.distributed import state_dict
from cce_torchrec.optimizer_state import kind_of
from tests.support.jobs import (
    OPTIMIZERS,
    SCHEDULE,
    assert_same_outputs,
    build,
    load_jobs,
    outputs,
    small_shards,
    step,
)
from tests.support.models import ROWWISE, BitsNet, Net, SequenceNet, shard, with_optimizer
from tests.support.ranks import on_ranks

ALONE, SEVERAL = ["unsharded", "tw", "dp"], ["tw", "cw", "dp", "rw"]


def save_jobs(rank, world_size, folder, kinds, optimizer, net):
    """Saves a trained and clustered job per kind; outputs at that point and one step later."""
    found = {}
    with small_shards(world_size):
        for number, kind in enumerate(kinds):
            model, own = build(kind, seed=10 * world_size + number, optimizer=optimizer, net=net)
            for seed in (1, 2):
                step(model, own, seed)
            cluster(model, optimizer=own)
            step(model, own, 6)
            where = f"{folder}/{kind} on {world_size}"
            save_checkpoint(
                where, model, step=3, optimizers=[own], schedule=SCHEDULE, extra={"a": 1}
            )
            before = outputs(model)
            step(model, own, 7)
            found[where] = (optimizer, before, outputs(model))
    return found


@pytest.fixture(scope="module")
def saved(rank_pool, tmp_path_factory):
    """A checkpoint of every kind of job on 1 to 4 ranks; on one rank spread is together."""
    found, folder = {}, str(tmp_path_factory.mktemp("jobs"))
    for world_size in (1, 2, 3, 4):
        kinds = ALONE if world_size == 1 else SEVERAL
        optimizer = "adagrad" if world_size == 3 else "rowwise"
        found |= rank_pool.run(world_size, save_jobs, folder, kinds, optimizer, Net)[0]
    assert len(found) == 15
    return found


@on_ranks(2, 3, 4)
@pytest.mark.parametrize("kind", SEVERAL)
def test_any_world_size_and_plan_to_any_other(rank, world_size, kind, saved):
    load_jobs(rank, world_size, kind, saved)


@on_ranks(1)
@pytest.mark.parametrize("kind", ALONE)
def test_any_world_size_and_plan_to_one_rank(rank, world_size, kind, saved):
    load_jobs(rank, world_size, kind, saved)


@pytest.fixture(scope="module")
def saved_sequences(rank_pool, tmp_path_factory):
    """As `saved`, of models with sequence embeddings."""
    found, folder = {}, str(tmp_path_factory.mktemp("sequences"))
    for world_size, kind in ((1, "unsharded"), (3, "tw"), (2, "cw"), (2, "rw"), (2, "dp")):
        found |= rank_pool.run(world_size, save_jobs, folder, [kind], "rowwise", SequenceNet)[0]
    return found


@pytest.fixture(scope="module")
def saved_bits(rank_pool, tmp_path_factory):
    """As `saved`, of codes of 0 to 12 bits."""
    found, folder = {}, str(tmp_path_factory.mktemp("bits"))
    for world_size, kind in ((1, "unsharded"), (2, "tw"), (3, "cw"), (2, "dp"), (3, "rw")):
        found |= rank_pool.run(world_size, save_jobs, folder, [kind], "rowwise", BitsNet)[0]
    return found


BITS = [(1, "unsharded"), (3, "tw"), (2, "cw"), (4, "rw"), (2, "dp")]


@pytest.mark.parametrize(("world_size", "kind"), BITS)
def test_codes_of_any_bits_from_any_plan_to_any_other(rank_pool, world_size, kind, saved_bits):
    rank_pool.run(world_size, load_jobs, kind, saved_bits, BitsNet)


FORMAT_3 = Path(__file__).with_name("format_3")
"""Of the last version with codes of whole bytes: saved by two ranks, of chunks on both."""


def old_tables():
    """Those of FORMAT_3: no codes, and such that have 1, 4 and 10 bits instead of 8 and 16 now."""
    return [
        CCEEmbeddingBagConfig(
            name=f"t{rows}", num_embeddings=45, embedding_dim=8, num_chunks=2,
            feature_names=[feature], num_rows=rows, num_helper_rows=3, track_seen=rows == 16,
        )
        for rows, feature in zip((1, 2, 16, 300), "fghf", strict=True)
    ]  # fmt: skip


def load_format_3(rank, world_size, kind, num_embeddings=45):
    configs = [replace(config, num_embeddings=num_embeddings) for config in old_tables()]
    model, own = build(kind, seed=5 + rank, configs=configs)
    grow = [config.name for config in configs] if num_embeddings > 45 else []
    report = load_checkpoint(FORMAT_3, model, optimizers=[own], grow=grow)
    assert report.step == 3 and sorted(report.loaded) == [
        *(f"collection.{name}" for name in ("t1", "t16", "t2", "t300")), "over.bias", "over.weight",
    ]  # fmt: skip
    for found, expected in zip(outputs(model), json.loads(OUTPUTS.read_text()), strict=True):
        # Not to the bit: they were written on another machine, whose libraries add otherwise.
        np.testing.assert_allclose(found, np.array(expected, dtype=np.float32), rtol=1e-6)


OUTPUTS = FORMAT_3 / "outputs.json"


@pytest.mark.parametrize("num_embeddings", [45, 70])
@pytest.mark.parametrize(("world_size", "kind"), [(1, "unsharded"), (2, "tw"), (3, "rw")])
def test_format_3_is_read(rank_pool, world_size, kind, num_embeddings):
    rank_pool.run(world_size, load_format_3, kind, num_embeddings)


SEQUENCES = [(1, "unsharded"), (2, "tw"), (2, "cw"), (3, "cw"), (3, "rw"), (2, "dp")]


@pytest.mark.parametrize(("world_size", "kind"), SEQUENCES)
def test_sequences_of_any_world_size_and_plan(rank_pool, world_size, kind, saved_sequences):
    rank_pool.run(world_size, load_jobs, kind, saved_sequences, SequenceNet)


def assert_same_state(jobs):
    """Of all optimizers, on this rank."""
    one, other = (optimizer_states(model, [dense]) for model, dense in jobs)
    assert one.keys() == other.keys()
    for name, state in one.items():
        for key, value in state.tensors.items():
            pair = [value, other[name].tensors[key]]
            shards = [
                [s.tensor for s in t.local_shards()] if hasattr(t, "local_shards") else [t]
                for t in pair
            ]
            for a, b in zip(*shards, strict=True):
                assert torch.equal(a, b), (name, key)


@on_ranks(2)
@pytest.mark.parametrize("net", [Net, SequenceNet])
def test_same_ranks_and_plan_is_bit_equal(rank, world_size, net, tmp_path):
    """All state comes back bit for bit, and training goes on equal."""
    model, dense = build("cw", seed=rank, net=net)
    step(model, dense, 1)
    cluster(model)
    where = save_checkpoint(tmp_path, model, step=1, optimizers=[dense])
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
    jobs = (model, dense), (other, other_dense)
    for last in (False, True):
        assert_same_state(jobs)
        assert_same_outputs(model, outputs(other))
        for m, d in jobs if not last else ():
            step(m, d, 8)
            cluster(m)


@on_ranks(2)
@pytest.mark.parametrize("kind", ["tw", "cw", "rw"])
def test_codes_are_saved_in_shards(rank, world_size, kind):
    """Shards are no larger than asked for, views where they can be, and found again by offset."""
    found = {}
    for most in (40, 300, 1 << 20):
        model, _ = build(kind, seed=rank)
        codes = {name: part.codes for name, part in model.module.collection.codes.items()}
        with mock.patch.object(state_dict, "SHARD_BYTES", most):
            state = model.state_dict()
            before = {name: held.clone() for name, held in codes.items()}
            elsewhere, again = copy.deepcopy(state), copy.deepcopy(state)
            shards = {
                name: state[f"collection.codes.{name}.codes"].local_shards() for name in codes
            }
            model.load_state_dict(state)
            for held in codes.values():
                held.zero_()
            model.load_state_dict(elsewhere)
        for name, held in codes.items():
            inside = range(held.data_ptr(), held.data_ptr() + held.nbytes)
            for part in shards[name]:
                assert part.tensor.data_ptr() in inside or kind == "cw"
                assert part.tensor.nbytes <= most or part.tensor.nbytes <= 8 * 4 * 2
            assert torch.equal(held, before[name]) and (not rank or not held.numel() or held.any())
        found[most] = sum(map(len, shards.values()))
    assert found[40] > found[300] > found[1 << 20]
    with (
        mock.patch.object(state_dict, "SHARD_BYTES", 100),
        pytest.raises(ValueError, match="the state dict is of another plan"),
    ):
        model.load_state_dict(again)


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


@on_ranks(1)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_fused_names(rank, world_size, optimizer):
    """What TorchRec calls the state in its kernels is what the table of optimizers says."""
    kind, (model, _) = kind_of(OPTIMIZERS[optimizer][0].__name__), build("tw", 0, optimizer)
    kept = [tensor for tensor in kind.tensors if tensor.fused]
    for state in model.fused_optimizer.state_dict()["state"].values():
        names = [key.rpartition(".")[2] for key in state]
        assert all(name in tensor.fused for name, tensor in zip(names, kept, strict=True))
        assert [kind.torch_name(name) for name in names] == [tensor.name for tensor in kept]


@on_ranks(2)
def test_plain_collections(rank, world_size, tmp_path):
    """Saved under DistributedModelParallel, loaded without it."""
    model, other = (with_optimizer(Plain(), ROWWISE) for _ in range(2))
    model = shard(model, Plain.configs(), "tw")
    save_checkpoint(tmp_path, model, step=1)
    report = load_checkpoint(tmp_path, other)
    assert report.tables == ["bags.t", "rows.e"] and report.dropped == []
    for name, value in model.state_dict().items():
        for part in value.local_shards():
            assert torch.equal(part.tensor, other.state_dict()[name])
