"""What a TorchRec user combines with tables: processors, codecs, optimizers, errors."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torchrec import KeyedJaggedTensor
from torchrec.distributed.fbgemm_qcomm_codec import (
    CommType,
    QCommsConfig,
    get_qcomm_codecs_registry,
)
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.distributed.types import ShardingType
from torchrec.modules.feature_processor_ import PositionWeightedModule
from torchrec.modules.fp_embedding_modules import FeatureProcessedEmbeddingBagCollection
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from cce_torchrec import CCEEmbeddingBagCollection, CCEEmbeddingBagConfig, CCEEmbeddingCollection
from cce_torchrec.checkpoint import load_checkpoint, save_checkpoint
from cce_torchrec.clustering import cluster, finalize
from cce_torchrec.clustering.local_chunks import fused_rows
from cce_torchrec.codes.storage import seen_ids
from cce_torchrec.distributed.data_parallel import data_parallel_parameters
from cce_torchrec.distributed.sharders import get_default_sharders
from cce_torchrec.planning import make_plan, make_planner
from tests.support.models import (
    CPU,
    KEYS,
    MEAN,
    SGD,
    STRIDE,
    SUM,
    Model,
    batch,
    collection,
    shard,
    shard_by,
    tables,
    with_optimizer,
)
from tests.support.ranks import on_ranks
from tests.support.twins import Pair, constrained

ADAGRAD = (torch.optim.Adagrad, {"lr": 0.1, "eps": 1e-8})
DENSE = [
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    # A large eps: Adam's first steps turn the rounding of tiny gradients into signs.
    (torch.optim.Adam, {"lr": 0.01, "eps": 1e-3, "amsgrad": True}),
    (torch.optim.AdamW, {"lr": 0.01, "eps": 1e-3}),
    ADAGRAD,
]


def of_class(value):
    return value[0].__name__


@on_ranks(2)
@pytest.mark.parametrize("optimizer", [SGD, ADAGRAD], ids=of_class)
def test_fused_optimizers(rank, world_size, optimizer):
    Pair("tw", (), SUM, False, optimizer).check(batch)


@on_ranks(2)
@pytest.mark.parametrize("optimizer", DENSE, ids=of_class)
def test_dense_optimizers_of_data_parallel_tables(rank, world_size, optimizer):
    cls, settings = optimizer
    pair = Pair("tw", ("t", "u"), SUM, False, SGD, lambda ps: cls(ps, **settings))
    pair.check(batch)
    for state in (pair.optimizer.state, pair.plain_optimizer.state):
        assert any(settings.get("momentum") or len(s) for s in state.values())


@on_ranks(2)
def test_data_parallel_state_is_the_same_on_all_ranks(rank, world_size):
    """Data-parallel codes, codebooks and optimizer state are bit-equal on all ranks."""
    pair = Pair("tw", ("t", "u"), SUM, False)
    pair.check(batch)
    own = {n: p.codes for n, p in pair.sharded.codes.items()}
    for name, (weight, state) in fused_rows(pair.sharded, pair.optimizer).items():
        if name != "p":
            own |= {name: weight, **{f"{name}.{k}": v for k, v in state.items()}}
    gathered = [None] * world_size
    dist.all_gather_object(gathered, own)
    for theirs in gathered:
        assert theirs.keys() == own.keys()
        for name in own:
            assert torch.equal(theirs[name], own[name]), name


@on_ranks(2)
def test_seen_ids_are_shared(rank, world_size, tmp_path):
    """Ids that one rank alone saw count on every rank."""
    config = CCEEmbeddingBagConfig(
        name="t", num_embeddings=64, embedding_dim=8, feature_names=["f"], num_rows=4,
        num_chunks=2, track_seen=True,
    )  # fmt: skip
    model = Model(CCEEmbeddingBagCollection([config]))
    model = shard(model, [config], data_parallel=["t"])
    ids = torch.arange(16) + 32 * rank
    kjt = KeyedJaggedTensor(keys=["f"], values=ids, lengths=torch.ones(16, dtype=torch.long))
    optimizer = torch.optim.SGD(data_parallel_parameters(model).values(), lr=0.1)
    model(kjt).wait().values().square().sum().backward()
    optimizer.step()
    both = torch.cat([torch.arange(16), torch.arange(16) + 32])
    save_checkpoint(tmp_path, model, step=1, optimizers=[optimizer])
    model.module.collection.codes["t"].seen.zero_()
    load_checkpoint(tmp_path, model, optimizers=[optimizer])
    found = seen_ids(model.module.collection.codes["t"].seen, 64).nonzero().view(-1)
    assert found.tolist() == both.tolist()  # saved for every rank, whoever saw them
    cluster(model, optimizer=optimizer, weights="seen")
    codes = [torch.empty(0)] * world_size
    dist.all_gather_object(codes, model.module.collection.codes["t"].codes)
    assert all(torch.equal(theirs, codes[0]) for theirs in codes)


@on_ranks(2)
def test_clustering_needs_the_optimizer_of_data_parallel_tables(rank, world_size):
    pair = Pair("tw", ("u",), SUM, False)
    codes = pair.sharded.codes["u"].codes.clone()
    with pytest.raises(ValueError, match=r"table 'u' is data-parallel and the optimizer is miss"):
        cluster(pair.model)
    dense = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(ValueError, match=r"table 'u' .* optimizer does not hold its parameters"):
        cluster(pair.model, optimizer=dense)
    assert torch.equal(codes, pair.sharded.codes["u"].codes)


@on_ranks(2)
def test_copies_that_differ_are_refused(rank, world_size):
    pair = Pair("tw", ("u",), SUM, False)
    codes = pair.sharded.codes["u"].codes.clone()
    if rank == 1:
        next(iter(data_parallel_parameters(pair.model).values())).data[0, 0] += 1
    with pytest.raises(ValueError, match=r"u', chunk 0: the copy on rank 1 differs from that"):
        cluster(pair.model, optimizer=pair.optimizer)
    assert torch.equal(codes, pair.sharded.codes["u"].codes)


@on_ranks(2)
@pytest.mark.parametrize("kind", [ShardingType.TABLE_ROW_WISE, ShardingType.GRID_SHARD])
def test_sharding_types_that_are_refused(rank, world_size, kind):
    model = Model(collection(tables(SUM), SGD))
    plan = make_plan(model, tables(SUM), CPU)
    plan.plan["collection"]["p"].sharding_type = kind.value
    with pytest.raises(ValueError, match=f"table 'p': sharding_type '{kind.value}' is not for"):
        shard_by(plan, model)


@on_ranks(2)
def test_ignored_optimizers_are_named(rank, world_size):
    """An in-backward optimizer on a data-parallel table, which TorchRec drops, is warned of."""
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger("cce_torchrec.distributed.optimizer_warnings")
    logger.addHandler(handler)
    for replicated in ((), ("u",)):
        shard(Model(collection(tables(SUM), SGD)), tables(SUM), data_parallel=replicated)
        assert len(said) == len(replicated)
    assert "tables ['u'] are data-parallel" in said[0]
    logger.removeHandler(handler)


@on_ranks(2)
def test_table_column_wise(rank, world_size):
    """Chunks over the ranks of one host, which is column-wise here; a plain table too."""
    model = Model(collection(tables(MEAN), SGD))
    planner = constrained(
        make_planner(tables(MEAN), world_size, CPU),
        t=ParameterConstraints(sharding_types=["table_column_wise"], min_partition=4),
        p=ParameterConstraints(sharding_types=["column_wise"], min_partition=4),
    )
    plan = planner.collective_plan(model, get_default_sharders(), dist.group.WORLD)
    assert plan.plan["collection"]["t"].sharding_type == "table_column_wise"
    assert len(plan.plan["collection"]["p"].ranks) == 2
    model = shard_by(plan, model)
    plain = collection(tables(MEAN), SGD)
    state = model.state_dict()
    for name in plain.state_dict():
        value = state.get(f"collection.{name}")
        if hasattr(value, "gather"):
            whole = torch.empty(value.size()) if rank == 0 else None
            if value.dtype == torch.float32:
                value.gather(0, whole)
                parts = [whole]
                dist.broadcast_object_list(parts)
                plain.get_parameter(name).data.copy_(parts[0])
    kjt = batch(rank, False)
    torch.testing.assert_close(model(kjt).wait().values(), plain(kjt).values())


@on_ranks(2)
def test_feature_processors(rank, world_size):
    """Gradients reach the weights that processors compute, unsharded and sharded."""

    def make():
        made = collection(tables(SUM), SGD, is_weighted=True)
        processors = {f: PositionWeightedModule(4) for f in ("f", "g", "h")}
        for i, processor in enumerate(processors.values()):
            nn.init.constant_(processor.position_weight, 0.5 + i)
        return FeatureProcessedEmbeddingBagCollection(made, processors)

    torch.manual_seed(0)
    plain, model = make(), Model(make())
    model = shard(model, tables(SUM), "cw")
    inner = plain._embedding_bag_collection.embedding_bag_collection.embedding_bags
    local = {
        n: w.clone()
        for n, (w, _) in fused_rows(model.module.collection._embedding_bag_collection).items()
    }
    gathered = [None] * world_size
    dist.all_gather_object(gathered, local)
    for name, weight in ((n, w) for part in gathered for n, w in part.items()):
        inner[name].weight.data.copy_(weight)
    batches = [batch(r, False) for r in range(world_size)]
    expected = [plain(b).values() for b in batches]
    out = model(batches[rank]).wait().values()
    torch.testing.assert_close(out, expected[rank])
    out.square().sum().backward()
    torch.stack([e.square().sum() for e in expected]).mean().backward()
    for name, processor in plain._feature_processors.items():
        own = model.module.collection._feature_processors[name].position_weight.grad.clone()
        dist.all_reduce(own)
        torch.testing.assert_close(own / world_size, processor.position_weight.grad)
    cluster(model)


@on_ranks(2)
def test_quantised_communication(rank, world_size):
    """fp16 embeddings and bf16 gradients on the network: outputs within the codec's rounding."""
    config = QCommsConfig(forward_precision=CommType.FP16, backward_precision=CommType.BF16)
    registry = get_qcomm_codecs_registry(config, device=CPU)
    outs = []
    for codecs in (None, registry):
        torch.manual_seed(rank)
        model = Model(collection(tables(SUM), SGD))
        plan = make_plan(model, tables(SUM), CPU, "cw")
        model = shard_by(plan, model, get_default_sharders(None, codecs))
        kjt = batch(rank, False)
        outs.append(model(kjt).wait().values())
        outs[-1].square().sum().backward()
    assert not torch.equal(*outs)  # the codec is at work
    torch.testing.assert_close(outs[1], outs[0], rtol=2**-10, atol=1e-6)  # fp16: 11 bits


def odd(seed, weighted):
    """int32 ids, and features without ids on one rank."""
    kjt = batch(seed, weighted)
    ids = torch.int32 if seed < 10 else torch.int64
    keep = {"f", "g", "h", "unused"} if seed % 2 else {"h"}
    jagged = {k: kjt[k] for k in KEYS}
    lengths = [jagged[k].lengths() * (k in keep) for k in KEYS]
    values = [jagged[k].values() if k in keep else jagged[k].values()[:0] for k in KEYS]
    return KeyedJaggedTensor(
        keys=KEYS, values=torch.cat(values).to(ids), lengths=torch.cat(lengths), stride=STRIDE
    )


@on_ranks(2)
@pytest.mark.parametrize(
    ("kind", "replicated"), [("tw", ()), ("cw", ()), ("tw", ("t",))], ids=["tw", "cw", "dp"]
)
def test_odd_batches(rank, world_size, kind, replicated):
    """int32 ids, no examples, and features without ids on one rank."""
    pair = Pair(kind, replicated, MEAN, False)
    pair.check(odd)
    empty = KeyedJaggedTensor(
        keys=KEYS, values=torch.empty(0, dtype=torch.long),
        lengths=torch.empty(0, dtype=torch.long), stride=0,
    )  # fmt: skip
    out = pair.model(empty).wait().values()
    assert out.shape == (0, 56)
    if not replicated:
        uneven = empty if rank == 0 else batch(rank, False)
        out = pair.model(uneven).wait().values()
        expected = pair.plain(uneven).values() if rank else torch.empty(0, 56)
        torch.testing.assert_close(out, expected)


@on_ranks(2)
def test_learning_rates_and_collections(rank, world_size):
    """A learning rate per table; two collections in one model, one with raw ids."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = CCEEmbeddingBagCollection(tables(SUM))
            raw = CCEEmbeddingBagConfig(
                name="raw", num_embeddings=50, embedding_dim=8, feature_names=["r"], num_rows=3,
                num_chunks=2, hash_ids=True,
            )  # fmt: skip
            self.second = CCEEmbeddingBagCollection([raw])

        def forward(self, kjt, raw):
            return self.first(kjt), self.second(raw)

    model = Two()
    named = dict(model.first.named_parameters())
    rates = {n: 0.0 if "t#" in n else 0.1 for n in named}
    for rate in (0.0, 0.1):
        some = [p for n, p in named.items() if rates[n] == rate]
        apply_optimizer_in_backward(torch.optim.SGD, some, {"lr": rate})
    apply_optimizer_in_backward(torch.optim.SGD, model.second.parameters(), {"lr": 0.1})
    configs = [*tables(SUM), *model.second.embedding_bag_configs()]
    model = shard(model, configs, "cw")
    rows = {**fused_rows(model.module.first), **fused_rows(model.module.second)}
    before = {n: w.clone() for n, (w, _) in rows.items()}
    g = torch.Generator().manual_seed(rank)
    raw = KeyedJaggedTensor(
        keys=["r"], values=torch.randint(-(2**62), 2**62, (9,), generator=g),
        lengths=torch.full((3,), 3),
    )  # fmt: skip
    outs = model(batch(rank, False), raw)
    sum(out.wait().values().square().sum() for out in outs).backward()
    for name, (weight, _) in rows.items():
        assert torch.equal(weight, before[name]) == name.startswith("t#"), name
    assert model.module.second.num_invalid_ids == 0
    clustered = {".".join(c.table.split(".")[-2:]) for c in cluster(model).chunks}
    assert clustered == {"first.u", "second.raw"}  # a rate of zero freezes a table


@on_ranks(2)
def test_codes_of_data_parallel_tables_in_a_state_dict(rank, world_size):
    """Codes of a data-parallel table are a plain tensor in the state dict."""
    pair = Pair("tw", ("t",), SUM, False)
    cluster(pair.model, optimizer=pair.optimizer)
    state = pair.model.state_dict()
    codes = state["collection.codes.t.codes"]
    assert type(codes) is torch.Tensor and codes.shape == (38, 12)  # 3 bits, 8 ids a row
    pair.copy()
    plain = {f"collection.{k}": v for k, v in pair.plain.state_dict().items()}
    other = Pair("tw", ("t",), SUM, False)
    wanted = {k: plain[k] if "t#" in k or "codes.t" in k else v for k, v in state.items()}
    other.model.load_state_dict(wanted)
    assert torch.equal(other.sharded.codes["t"].codes, pair.sharded.codes["t"].codes)
    assert other.sharded.codes["t"].num_clusterings == 1
    kjt = batch(rank, False)
    assert torch.equal(other.model(kjt).wait()["g"], pair.model(kjt).wait()["g"])


@on_ranks(2)
def test_data_parallel_tables_are_finalized(rank, world_size):
    """They save their codes, and train on."""
    pair = Pair("tw", ("t",), SUM, False)
    pair.copy()
    finalize(pair.model, optimizer=pair.optimizer)
    finalize(pair.plain, optimizer=pair.plain_optimizer)
    pair.compare(exact=True)
    assert pair.sharded.codes["t"].config.helper_rows == 0
    assert pair.model.state_dict()["collection.codes.t.codes"].shape == (75, 12)  # 6 bits, 4 ids
    pair.train(batch, (0,))
    pair.compare(exact=False)


@on_ranks(2)
def test_sequences_are_finalized(rank, world_size):
    shape = dict(embedding_dim=16, num_embeddings=300)
    config = CCEEmbeddingBagConfig(name="t", feature_names=["f"], num_rows=100, **shape)
    model = Model(with_optimizer(CCEEmbeddingCollection([config]), SGD))
    sharded = shard(model, [config], "cw")
    finalize(sharded)
    found = sharded.module.collection.embedding_configs()
    assert [(c.num_rows, c.helper_rows) for c in found] == [(400, 0)]
    values = sharded(batch(rank, False)).wait()["f"].values()
    assert values.shape[1] == 16
