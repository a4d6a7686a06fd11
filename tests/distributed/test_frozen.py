"""Frozen tables of sharded models: no backward pass and no clustering step changes them."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torchrec.inference.modules import quantize_embeddings
from torchrec.modules.feature_processor_ import PositionWeightedModule
from torchrec.modules.fp_embedding_modules import FeatureProcessedEmbeddingBagCollection
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.keyed import KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

from cce_torchrec import CCEEmbeddingBagCollection
from cce_torchrec.checkpoint import load_checkpoint, save_checkpoint
from cce_torchrec.clustering import cluster, finalize
from cce_torchrec.clustering.local_chunks import fused_rows
from cce_torchrec.distributed import data_parallel, optimizer_warnings
from cce_torchrec.distributed.data_parallel import data_parallel_parameters
from cce_torchrec.distributed.sharders import get_default_sharders
from cce_torchrec.inference import inference_model
from cce_torchrec.modules import quantization
from cce_torchrec.planning import make_plan
from cce_torchrec.table import logical_table
from tests.support.models import (
    CPU,
    ROWWISE,
    SGD,
    SUM,
    Model,
    Net,
    SequenceNet,
    batch,
    shard,
    shard_by,
    tables,
    vbe_batch,
    with_optimizer,
)
from tests.support.ranks import on_ranks


def parameters_of(model, names):
    return [p for n, p in model.named_parameters() if n.split(".")[-2].split("#")[0] in names]


def frozen_model(kind, names, when, optimizer=ROWWISE, net=Net):
    """`names` are frozen before or after the others get their optimizer in backward."""
    torch.manual_seed(0)
    configs = net.configs()
    model = net(configs)
    if when == "after" and kind != "dp":
        with_optimizer(model.collection, optimizer)
    for p in parameters_of(model, names):
        p.requires_grad_(False)
    if when == "before":
        rest = [p for p in model.collection.parameters() if p.requires_grad]
        apply_optimizer_in_backward(optimizer[0], rest, dict(optimizer[1]))
    whole = [c.name for c in configs] if kind == "dp" else []
    return shard(model, configs, kind.replace("dp", "tw"), data_parallel=whole)


def snapshot(model):
    """Rows and optimizer state on this rank, codes and clusterings."""
    bags = getattr(model.module.collection, "bags", model.module.collection)
    out = {}
    for name, (weight, state) in fused_rows(bags).items():
        out |= {(name, key): value.clone() for key, value in {"": weight, **state}.items()}
    for name, codes in bags.codes.items():
        out |= {(name, key): value.clone() for key, value in codes.named_buffers()}
    return out


def changed(before, after):
    assert before.keys() == after.keys()
    return {logical_table(n) for n, key in before if not torch.equal(before[n, key], after[n, key])}


def everywhere(names, world_size):
    found = [None] * world_size
    torch.distributed.all_gather_object(found, names)
    return set().union(*found)


def train(model, rank, steps=3):
    # Everything that TorchRec leaves to the user, as the documents do it; decay moves what has a
    # gradient, zero or not.
    dense = dict(in_backward_optimizer_filter(model.named_parameters()))
    own = KeyedOptimizerWrapper(dense, lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.1))
    for seed in range(steps):
        own.zero_grad()
        model.fused_optimizer.zero_grad()
        model(batch(10 * seed + rank, False)).square().sum().backward()
        own.step()
    return own


ALL = ["t", "p", "u"]
CASES = [
    ("tw", ["t", "p"], "after", Net), ("tw", ["u"], "before", Net),
    ("cw", ["t", "p"], "after", Net), ("cw", ALL, "after", Net),
    ("rw", ["t"], "after", Net), ("rw", ["u"], "before", Net),
    ("dp", ["t", "p"], "after", Net), ("dp", ALL, "after", Net),
    ("cw", ALL, "after", SequenceNet),
]  # fmt: skip


@on_ranks(2)
@pytest.mark.parametrize(("kind", "names", "when", "net"), CASES)
def test_frozen_tables_stay_as_they_are(rank, world_size, kind, names, when, net):
    model = frozen_model(kind, names, when, net=net)
    before, over = snapshot(model), model.module.over.weight.detach().clone()
    optimizer = train(model, rank)
    assert everywhere(changed(before, snapshot(model)), world_size) == {"t", "p", "u"} - set(names)
    assert not torch.equal(over, model.module.over.weight)  # the network above learns
    before = snapshot(model)
    report = cluster(model, optimizer=optimizer if kind == "dp" else None)
    rest = {"t", "u"} - set(names)
    assert everywhere(changed(before, snapshot(model)), world_size) == rest
    assert {p.rpartition(".")[2] for p in report.left_alone} == {"t", "u"} & set(names)
    finalize(model, optimizer=optimizer if kind == "dp" else None)
    configs = getattr(model.module.collection, "bags", model.module.collection)
    finished = {c.name: c.helper_rows == 0 for c in configs.embedding_bag_configs()[::2]}
    assert finished == {name: name in rest for name in finished}


@on_ranks(2)
def test_a_variable_batch_that_kernels_on_cpus_cannot_take_is_refused(rank, world_size):
    told = r"tables \['t'\] are frozen and others are not"
    with pytest.raises(ValueError, match=told):
        frozen_model("tw", ["t"], "after", net=SequenceNet)
    model = frozen_model("tw", ["t"], "after")
    with pytest.raises(ValueError, match=told):
        model.module.collection(vbe_batch(rank, False))
    model = frozen_model("tw", ALL, "after")
    model.module.collection(vbe_batch(rank, False)).wait()


@on_ranks(2)
def test_data_parallel_parameters_are_those_to_train(rank, world_size):
    model = frozen_model("dp", ["t", "p"], "after")
    own = data_parallel_parameters(model)
    assert {name.split(".")[-2] for name in own} == {"u#0", "u#1"}
    cluster(model, optimizer=torch.optim.SGD(own.values(), lr=0.1))


@on_ranks(2)
def test_only_tables_that_are_clustered_need_their_optimizer(rank, world_size):
    model = Net(tables(SUM))
    with_optimizer(model.collection, ROWWISE)
    model = shard(model, tables(SUM), "tw", data_parallel=["t"])
    with pytest.raises(ValueError, match="table 't' is data-parallel and the optimizer is missing"):
        cluster(model)
    assert cluster(model, tables=["u"]).chunks


@on_ranks(2)
@pytest.mark.parametrize("kind", ["tw", "cw", "rw"])
def test_a_rate_of_zero_freezes_a_table(rank, world_size, kind):
    torch.manual_seed(0)
    model = Net(tables(SUM))
    for names, lr in ((["t"], 0.0), (["p", "u"], 0.1)):
        apply_optimizer_in_backward(SGD[0], parameters_of(model, names), {"lr": lr})
    model = shard(model, tables(SUM), kind)
    before = snapshot(model)
    report = cluster(model)
    assert everywhere(changed(before, snapshot(model)), world_size) == {"u"}
    (why,) = report.left_alone.values()
    assert why.startswith("frozen: its learning rate is 0")
    for group in model.fused_optimizer.param_groups:
        group["lr"] = 0.1
    assert cluster(model).left_alone == {}


@on_ranks(2)
def test_ranks_that_freeze_other_tables_are_refused(rank, world_size):
    """A codebook that is spread has one owner a chunk, who alone knows its rate."""
    model = with_model("cw")
    if rank == 1:
        for group in model.fused_optimizer.param_groups:
            group["lr"] = 0.0
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"'.*collection.[tu]' is frozen.*on rank 1, and some"):
        cluster(model)
    assert not changed(before, snapshot(model))
    with pytest.raises(ValueError, match="ranks disagree about the options"):
        cluster(model, tables=[["t"], ["u"]][rank])
    with pytest.raises(ValueError, match="ranks disagree about the options"):
        cluster(model, recipes=[["rare"], ["frequent"]][rank])
    with pytest.raises(ValueError, match="no table 'x'"):
        cluster(model, tables=["x"])


def with_model(kind):
    torch.manual_seed(0)
    model = Net(tables(SUM))
    with_optimizer(model.collection, ROWWISE)
    return shard(model, tables(SUM), kind)


@on_ranks(1)
def test_chunks_frozen_in_part_are_refused(rank, world_size):
    model = Net(tables(SUM))
    with_optimizer(model.collection, ROWWISE)
    parameters_of(model, ["t"])[1].requires_grad_(False)
    with pytest.raises(ValueError, match=r"tables \['t'\]: some chunks require a gradient"):
        shard(model, tables(SUM), "tw")


@on_ranks(2)
def test_weights_of_samples_learn_through_a_frozen_table(rank, world_size):
    configs = tables(SUM)
    torch.manual_seed(0)
    inner = with_optimizer(CCEEmbeddingBagCollection(configs, is_weighted=True), ROWWISE)
    processors = {f: PositionWeightedModule(max_feature_length=9) for f in ("f", "g", "h")}
    model = Model(FeatureProcessedEmbeddingBagCollection(inner, torch.nn.ModuleDict(processors)))
    for p in inner.parameters():
        p.requires_grad_(False)
    model = shard_by(make_plan(model, configs, CPU, "tw"), model, get_default_sharders())
    sharded = model.module.collection._embedding_bag_collection
    before = {n: weight.clone() for n, (weight, _) in fused_rows(sharded).items()}
    model.fused_optimizer.step()  # hands its rate to the kernels
    model(batch(rank, False)).wait().values().square().sum().backward()
    assert all(torch.equal(before[n], weight) for n, (weight, _) in fused_rows(sharded).items())
    learned = [p.grad for n, p in model.named_parameters() if "position_weight" in n]
    assert any(grad is not None and grad.any() for grad in learned)


@on_ranks(2)
def test_a_frozen_table_takes_its_checkpoint(rank, world_size, tmp_path):
    """A table that was trained is frozen for fine-tuning; its optimizer state waits for it."""
    model = with_model("tw")
    train(model, rank)
    save_checkpoint(tmp_path, model, step=3)
    tuned = frozen_model("tw", ["t"], "after")
    report = load_checkpoint(tmp_path, tuned)
    assert not [line for line in report.dropped if "table" in line]
    before = snapshot(tuned)
    assert not changed(before, snapshot(model))
    train(tuned, rank)
    assert everywhere(changed(before, snapshot(tuned)), world_size) == {"p", "u"}


def told_of(make):
    """Warnings of `make`, by the module that plans are carried out in."""
    with mock.patch.object(optimizer_warnings.logger, "warning") as warning:
        make()
    return [call.args[0] % call.args[1:] for call in warning.call_args_list]


def chosen_kernel(kernel):
    model = Net(tables(SUM))
    plan = make_plan(model, tables(SUM), CPU, "tw")
    for sharding in plan.plan["collection"].values():
        sharding.compute_kernel = kernel
    return plan, model


@on_ranks(2)
@pytest.mark.parametrize(
    ("kernel", "told"),
    [("dense", "trains nothing"), ("fused", "SGD at a rate of 0.01")],
)
def test_tables_without_an_optimizer_are_named_once(rank, world_size, kernel, told):
    plan, model = chosen_kernel(kernel)
    (*messages,) = told_of(lambda: shard_by(plan, model))
    assert len(messages) == (rank == 0)
    for message in messages:
        assert "['p', 't', 'u']" in message and told in message
    plan, model = chosen_kernel("fused")
    named = get_default_sharders({"optimizer": EmbOptimType.EXACT_SGD, "learning_rate": 0.1})
    assert told_of(lambda: shard_by(plan, model, named)) == []


@on_ranks(1)
def test_settings_that_kernels_ignore_are_named(rank, world_size):
    def decayed():
        model = Net(tables(SUM))
        for names, decay in ((["t"], 0.01), (["p", "u"], 0.0)):
            settings = {"lr": 0.1, "weight_decay": decay}
            apply_optimizer_in_backward(SGD[0], parameters_of(model, names), settings)
        shard(model, tables(SUM), "tw")

    (message,) = told_of(decayed)
    assert "tables ['t']: FBGEMM's kernels on CPUs ignore weight_decay=0.01" in message
    model = Net(tables(SUM))
    with_optimizer(model.collection, ROWWISE)
    plan = make_plan(model, tables(SUM), CPU, "tw")
    (message,) = told_of(lambda: shard_by(plan, model, get_default_sharders({"max_norm": 1.0})))
    assert "['p', 't', 'u']" in message and "max_norm=1.0" in message


@on_ranks(1)
@pytest.mark.parametrize("net", [Net, SequenceNet])
def test_quantisation_of_a_sharded_model_says_what_it_leaves(rank, world_size, net):
    model = shard(net(net.configs()), net.configs(), "tw")
    with mock.patch.object(quantization.logger, "warning") as warning:
        quantize_embeddings(model, torch.qint8, inplace=True)
    (call,) = warning.call_args_list
    assert sorted(call.args[1]) == ["p", "t", "u"] and "are sharded" in call.args[0]
    model(batch(0, False))


@on_ranks(1)
@pytest.mark.parametrize("net", [Net, SequenceNet])
def test_a_sharded_model_is_not_packed_for_serving(rank, world_size, net):
    model = shard(net(net.configs()), net.configs(), "tw")
    with pytest.raises(ValueError, match=r"collection: the tables are sharded; save a checkpoint"):
        inference_model(model)


@on_ranks(1)
def test_no_data_parallel_table_is_said(rank, world_size):
    with mock.patch.object(data_parallel.logger, "warning") as warning:
        assert data_parallel_parameters(with_model("tw")) == {}
    assert "no CCE collection has a data-parallel table" in warning.call_args.args[0]
