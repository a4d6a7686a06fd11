"""What optimizers keep comes back with a checkpoint bit for bit, or is named as dropped."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.optim import PostLocalSGDOptimizer, ZeroRedundancyOptimizer
from torchrec.optim.clipping import GradientClipping, GradientClippingOptimizer
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.warmup import WarmupOptimizer, WarmupPolicy, WarmupStage

from cce_torchrec.checkpoint import load_checkpoint, save_checkpoint
from tests.support.jobs import assert_same_outputs, build, outputs
from tests.support.models import batch
from tests.support.ranks import on_ranks


def warm(optimizer):
    stages = [WarmupStage(WarmupPolicy.LINEAR, max_iters=7, value=0.1)]
    return WarmupOptimizer(optimizer, stages, lr=0.2)


def keyed(model):
    dense = {name: p for name, p in model.named_parameters() if "over" in name}
    return KeyedOptimizerWrapper(dense, lambda p: torch.optim.Adam(p, lr=0.05))


def clipped(optimizer):
    return GradientClippingOptimizer(optimizer, GradientClipping.NORM, max_gradient=0.5)


WRAPPED = {
    "all of them in one warm-up": lambda m: warm(
        CombinedOptimizer([m.fused_optimizer, ("dense", keyed(m))])
    ),
    "a warm-up of each": lambda m: CombinedOptimizer(
        [("tables", warm(m.fused_optimizer)), ("dense", warm(keyed(m)))]
    ),
    "clipped inside": lambda m: CombinedOptimizer(
        [m.fused_optimizer, ("dense", warm(clipped(keyed(m))))]
    ),
    "clipped outside": lambda m: CombinedOptimizer(
        [m.fused_optimizer, ("dense", clipped(warm(keyed(m))))]
    ),
    "nested": lambda m: CombinedOptimizer(
        [("all", CombinedOptimizer([m.fused_optimizer, ("dense", warm(keyed(m)))]))]
    ),
}


def rates(model, optimizer):
    kernels = [tbe.get_learning_rate() for tbe in kernels_of(model)]
    return [*kernels, *(group["lr"] for group in optimizer.param_groups)]


def kernels_of(model):
    lookups = model.module.collection._lookups
    return [kernel.emb_module for lookup in lookups for kernel in lookup._emb_modules]


def train(model, optimizer, seeds):
    for seed in seeds:
        optimizer.zero_grad()
        model(batch(seed, False)).square().sum().backward()
        optimizer.step()


@on_ranks(2)
@pytest.mark.parametrize("how", WRAPPED)
def test_a_warm_up_goes_on(rank, world_size, how, tmp_path):
    (model, _), (other, _) = build("tw", seed=rank), build("tw", seed=9 + rank)
    own, its = WRAPPED[how](model), WRAPPED[how](other)
    train(model, own, range(3))
    save_checkpoint(tmp_path, model, step=3, optimizers=[own])
    assert load_checkpoint(tmp_path, other, optimizers=[its]).dropped == []
    for _ in range(3):
        assert rates(other, its) == rates(model, own)
        train(model, own, [4])
        train(other, its, [4])
    assert_same_outputs(other, outputs(model))


@on_ranks(1)
def test_a_rate_that_no_kernel_has_taken_yet(rank, world_size, tmp_path):
    (model, own), (other, its) = build("tw", seed=0), build("tw", seed=1)
    for group in model.fused_optimizer.param_groups:
        group["lr"] = 0.7
    before = [tbe.get_learning_rate() for tbe in kernels_of(model)]
    save_checkpoint(tmp_path, model, step=0, optimizers=[own])
    load_checkpoint(tmp_path, other, optimizers=[its])
    assert [group["lr"] for group in other.fused_optimizer.param_groups] == [0.7] * len(before)
    # The kernel still has the rate at which its next backward pass would train.
    assert [tbe.get_learning_rate() for tbe in kernels_of(other)] == before != [0.7] * len(before)


@on_ranks(1)
def test_a_schedule_goes_on(rank, world_size, tmp_path):
    """The scheduler's own numbers are the caller's to keep; the others are in the groups."""
    (model, _), (other, _) = build("tw", seed=0), build("tw", seed=1)
    own = CombinedOptimizer([model.fused_optimizer, ("dense", keyed(model))])
    its = CombinedOptimizer([other.fused_optimizer, ("dense", keyed(other))])
    schedule = torch.optim.lr_scheduler.ExponentialLR(own, gamma=0.9)
    for seed in range(3):
        train(model, own, [seed])
        schedule.step()
    extra = {"scheduler": schedule.state_dict()}
    save_checkpoint(tmp_path, model, step=3, optimizers=[own], extra=extra)
    extra = load_checkpoint(tmp_path, other, optimizers=[its]).extra
    # What a scheduler that is made now counts from, as after torch's own load_state_dict.
    assert all("initial_lr" in group for group in its.param_groups)
    again = torch.optim.lr_scheduler.ExponentialLR(its, gamma=0.9)
    assert again.base_lrs == schedule.base_lrs
    again.load_state_dict(extra["scheduler"])
    for seed in (3, 4):
        assert rates(other, its) == rates(model, own)
        for m, o, s in ((model, own, schedule), (other, its, again)):
            train(m, o, [seed])
            s.step()
    assert_same_outputs(other, outputs(model))


@on_ranks(2)
def test_fine_tuning_keeps_the_models_rates(rank, world_size, tmp_path):
    (model, _), (other, _) = build("tw", seed=rank), build("tw", seed=9 + rank)
    how = WRAPPED["a warm-up of each"]
    own, its = how(model), how(other)
    train(model, own, range(3))
    save_checkpoint(tmp_path, model, step=3, optimizers=[own])
    train(other, its, [5])
    before, state = rates(other, its), copy.deepcopy(its.state_dict()["state"]["tables.__warmup"])
    report = load_checkpoint(tmp_path, other, optimizers=[its], learning_rates="model")
    assert (report.learning_rates, report.dropped) == ("model", [])
    assert rates(other, its) == before != rates(model, own)
    assert torch.equal(its.state_dict()["state"]["tables.__warmup"]["warmup"], state["warmup"])
    assert_same_outputs(other, outputs(model))
    report = load_checkpoint(tmp_path, other, optimizers=[its], tables=["t"])
    assert report.learning_rates == "model" and rates(other, its) == before
    report = load_checkpoint(tmp_path, other, optimizers=[its])
    assert report.learning_rates == "checkpoint" and rates(other, its) == rates(model, own)


@on_ranks(2)
@pytest.mark.parametrize(
    ("chosen", "told"),
    [
        (["new", "new"], "learning_rates 'new': choose one of"),
        (["model", "checkpoint"], "disagree"),
    ],
)
def test_other_learning_rates_are_refused_on_every_rank(rank, world_size, chosen, told, tmp_path):
    model, own = build("tw", seed=rank)
    save_checkpoint(tmp_path, model, step=0, optimizers=[own])
    with pytest.raises(ValueError, match=told):
        load_checkpoint(tmp_path, model, optimizers=[own], learning_rates=chosen[rank])


def dense_net(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Linear(4, 2).to(dtype)


def dense_steps(model, optimizer, count):
    for seed in range(count):
        torch.manual_seed(seed)
        optimizer.zero_grad()
        model(torch.randn(3, 4).to(model.weight.dtype)).square().sum().backward()
        optimizer.step()


DENSE = {
    "amsgrad": (lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True), torch.float32),
    "maximize": (lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, maximize=True), torch.float32),
    "fused": (lambda p: torch.optim.AdamW(p, lr=0.1, fused=True), torch.float32),
    "a tensor": (lambda p: torch.optim.Adam(p, lr=torch.tensor(0.3)), torch.float32),
    "bfloat16": (lambda p: torch.optim.Adam(p, lr=0.1), torch.bfloat16),
    "float64": (lambda p: torch.optim.NAdam(p, lr=0.1), torch.float64),
    "adafactor": (lambda p: torch.optim.Adafactor(p, lr=0.1), torch.float32),
    "nesterov": (
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True), torch.float32
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DENSE)
def test_torchs_own_come_back_bit_for_bit(name, tmp_path):
    make, dtype = DENSE[name]
    model, other = dense_net(dtype), dense_net(dtype)
    own = make(model.parameters())
    # Flags of the checkpoint win over those that it was built with, as in torch's own loading.
    its = type(own)(other.parameters())
    dense_steps(model, own, 3)
    save_checkpoint(tmp_path, model, step=3, optimizers=[own])
    assert load_checkpoint(tmp_path, other, optimizers=[its]).dropped == []
    assert [{k: v for k, v in g.items() if k != "params"} for g in own.param_groups] == [
        {k: v for k, v in g.items() if k != "params"} for g in its.param_groups
    ]
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert own.state[p].keys() == its.state[q].keys()
        for key, value in own.state[p].items():
            got = its.state[q][key]
            assert (got.dtype, got.device) == (value.dtype, value.device), key
            assert torch.equal(got, value), key
    dense_steps(model, own, 2)
    dense_steps(other, its, 2)
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_numbers_in_the_state(tmp_path):
    """SparseAdam counts its steps by Python's integers."""
    table, other = nn.Embedding(5, 4, sparse=True), nn.Embedding(5, 4, sparse=True)
    own, its = (torch.optim.SparseAdam(list(m.parameters())) for m in (table, other))
    for _ in range(3):
        own.zero_grad()
        table(torch.tensor([1, 3])).square().sum().backward()
        own.step()
    save_checkpoint(tmp_path, table, step=3, optimizers=[own])
    assert load_checkpoint(tmp_path, other, optimizers=[its]).dropped == []
    assert its.state[other.weight]["step"] == own.state[table.weight]["step"] == 3


def test_state_that_no_checkpoint_holds_is_named(tmp_path):
    model, other = dense_net(), dense_net()
    own, its = (torch.optim.LBFGS(m.parameters(), max_iter=6, lr=0.1) for m in (model, other))
    x = torch.randn(3, 4)

    def closure():
        own.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        return loss

    own.step(closure)
    own.param_groups[0]["after"] = print
    save_checkpoint(tmp_path, model, step=1, optimizers=[own])
    dropped = load_checkpoint(tmp_path, other, optimizers=[its]).dropped
    assert any("'weight': LBFGS keeps" in line and "'old_dirs' (list)" in line for line in dropped)
    assert any(
        "setting of parameter 'bias': JSON does not hold 'after'" in line for line in dropped
    )
    assert not its.state


@on_ranks(2)
def test_state_that_is_spread_over_ranks_is_named(rank, world_size, tmp_path):
    model = dense_net()
    own = ZeroRedundancyOptimizer(model.parameters(), torch.optim.Adam, lr=0.1)
    dense_steps(model, own, 1)
    save_checkpoint(tmp_path, model, step=1, optimizers=[own])
    (dropped,) = load_checkpoint(tmp_path, model, optimizers=[own]).dropped
    assert "'optimizers[0]': ZeroRedundancyOptimizer keeps state" in dropped


def test_a_second_optimizer_inside_is_named(tmp_path):
    semi_sync = pytest.importorskip("torchrec.optim.semi_sync")
    model = dense_net()
    named = dict(model.named_parameters())
    local = KeyedOptimizerWrapper(named, torch.optim.Adam)
    outer = KeyedOptimizerWrapper(named, lambda p: torch.optim.SGD(p, lr=0.1))
    own = semi_sync.SemisyncOptimizer(list(named.values()), local, outer, num_local_steps=9)
    dense_steps(model, own, 2)
    save_checkpoint(tmp_path, model, step=2, optimizers=[own])
    (dropped,) = load_checkpoint(tmp_path, model, optimizers=[own]).dropped
    assert "'optimizers[0]': SemisyncOptimizer keeps state" in dropped


@on_ranks(1)
def test_steps_of_an_averager_are_named(rank, world_size, tmp_path):
    model = dense_net()
    averager = PeriodicModelAverager(period=4)
    own = PostLocalSGDOptimizer(torch.optim.Adam(model.parameters()), averager)
    dense_steps(model, own, 2)
    save_checkpoint(tmp_path, model, step=2, optimizers=[own])
    (dropped,) = load_checkpoint(tmp_path, model, optimizers=[own]).dropped
    assert "'optimizers[0].state': PostLocalSGDOptimizer keeps 'step'" in dropped


def test_a_second_optimizer_of_a_parameter_is_named(tmp_path):
    model = dense_net()
    first = torch.optim.Adam(model.parameters())
    second = torch.optim.SGD([model.bias], lr=0.1, momentum=0.9)
    # Given twice, by itself and in another: that is the same one.
    both = CombinedOptimizer([("first", KeyedOptimizerWrapper(
        dict(model.named_parameters()), lambda _: first
    ))])  # fmt: skip
    dense_steps(model, first, 1)
    save_checkpoint(tmp_path, model, step=1, optimizers=[both, first, second])
    assert load_checkpoint(tmp_path, model, optimizers=[both, first, second]).dropped == []
    second.step()
    save_checkpoint(tmp_path, model, step=2, optimizers=[both, first, second])
    (dropped,) = load_checkpoint(tmp_path, model, optimizers=[both, first, second]).dropped
    assert "'optimizers[2].bias': SGD keeps state of 'bias', which another" in dropped


def test_groups_that_the_model_has_joined_are_named(tmp_path):
    """torch's own loading refuses another number of groups; the last one would win here."""
    model = dense_net()
    apart = torch.optim.SGD(
        [{"params": [model.weight], "lr": 0.1}, {"params": [model.bias], "lr": 0.2}],
        weight_decay=0.01,
    )
    joined = torch.optim.SGD(model.parameters(), lr=0.3)
    save_checkpoint(tmp_path, model, step=0, optimizers=[apart])
    (dropped,) = load_checkpoint(tmp_path, model, optimizers=[joined]).dropped
    assert "'lr': 'weight' was saved with 0.1 and 'bias' with 0.2, and one group" in dropped
    for rates in ("checkpoint", "model"):
        assert (
            load_checkpoint(tmp_path, model, optimizers=[apart], learning_rates=rates).dropped == []
        )
    report = load_checkpoint(tmp_path, model, optimizers=[joined], learning_rates="model")
    assert report.dropped == [] and joined.param_groups[0]["weight_decay"] == 0.01


def test_parameters_that_are_not_the_models(tmp_path):
    """A loss with parameters of its own, say; and state under a name."""
    model, other = dense_net(), dense_net()
    loss, its_loss = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    own = torch.optim.Adam([*model.parameters(), loss])
    its = torch.optim.Adam([*other.parameters(), its_loss])
    loss.grad = torch.ones(2)
    dense_steps(model, own, 0)
    own.step()
    save_checkpoint(tmp_path, model, step=1, optimizers=[own])
    assert load_checkpoint(tmp_path, other, optimizers=[its]).dropped == []
    assert torch.equal(its.state[its_loss]["exp_avg"], own.state[loss]["exp_avg"])
    own.state["rounds"] = 3
    save_checkpoint(tmp_path, model, step=2, optimizers=[own])
    dropped = load_checkpoint(tmp_path, other, optimizers=[its]).dropped
    assert len(dropped) == 1 and "state of 'rounds'" in dropped[0]


def test_a_checkpoint_of_before_the_first_step(tmp_path):
    model = dense_net()
    own = torch.optim.Adam(model.parameters())
    save_checkpoint(tmp_path, model, step=0, optimizers=[own])
    dense_steps(model, own, 2)
    assert load_checkpoint(tmp_path, model, optimizers=[own]).dropped == [] and not own.state


@on_ranks(1)
def test_hyperparameters_that_were_set_later(rank, world_size, tmp_path):
    (model, own), (other, its) = build("tw", seed=0), build("tw", seed=1)
    model.fused_optimizer.update_hyper_parameters({"eps": 0.5})
    train(model, own, [1, 2])
    save_checkpoint(tmp_path, model, step=2, optimizers=[own])
    load_checkpoint(tmp_path, other, optimizers=[its])
    for mine, theirs in zip(kernels_of(model), kernels_of(other), strict=True):
        assert theirs.optimizer_args.eps == 0.5 and int(theirs.iter) == int(mine.iter)
