"""A sharded collection on two ranks: ids on the network, failures, meta, state dicts, groups."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torchrec
from torch import nn
from torchrec import KeyedJaggedTensor
from torchrec.distributed import DistributedModelParallel
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from cce_torchrec import CCEEmbeddingBagCollection, CCEEmbeddingBagConfig
from cce_torchrec.clustering import cluster, owned, step
from cce_torchrec.clustering import plan as plans
from cce_torchrec.clustering.local_chunks import fused_rows, unsharded_rows
from cce_torchrec.distributed.sharders import get_default_sharders
from cce_torchrec.kmeans import kmeans
from cce_torchrec.planning import make_plan
from tests.support.ranks import run_ranks

CPU = torch.device("cpu")
STRIDE = 6
KEYS = ["g", "h", "unused", "f"]


def tables(pooling):
    return [
        CCEEmbeddingBagConfig(
            name="t", num_embeddings=300, embedding_dim=16, feature_names=["f", "g"], num_rows=5,
            pooling=pooling,
        ),
        EmbeddingBagConfig(
            name="p", num_embeddings=40, embedding_dim=8, feature_names=["h", "f"],
            pooling=PoolingType.SUM,
        ),
        CCEEmbeddingBagConfig(
            name="u", num_embeddings=1000, embedding_dim=8, feature_names=["h"], num_rows=300,
            num_chunks=2, pooling=pooling,
        ),
    ]  # fmt: skip


class Model(nn.Module):
    def __init__(self, collection):
        super().__init__()
        self.collection = collection

    def forward(self, kjt):
        return self.collection(kjt)


def batch(seed, weighted):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 4, (len(KEYS) * STRIDE,), generator=g)
    total = int(lengths.sum())
    return KeyedJaggedTensor(
        keys=KEYS,
        values=torch.randint(0, 40, (total,), generator=g),
        lengths=lengths,
        weights=torch.rand(total, generator=g) if weighted else None,
        stride=STRIDE,
    )


def collection(pooling, weighted, optimizer):
    made = CCEEmbeddingBagCollection(tables=tables(pooling), is_weighted=weighted)
    cls = {"rowwise": torchrec.optim.RowWiseAdagrad, "sgd": torch.optim.SGD}[optimizer]
    # FBGEMM's eps; TorchRec's own row-wise Adagrad has 1e-10, which shows in tiny gradients.
    settings = {"lr": 0.1, "eps": 1e-8} if optimizer == "rowwise" else {"lr": 0.1}
    apply_optimizer_in_backward(cls, list(made.parameters()), settings)
    return made


def copy_state(sharded, plain):
    """Weights and codes of the owners into the unsharded twin on every rank, bit for bit."""
    local = {
        name: (weight.clone(), {k: v.clone() for k, v in state.items()})
        for name, (weight, state) in fused_rows(sharded).items()
    }
    codes = {
        (name, chunk, part.ids): part.codes[:, i].clone().to(torch.int64)
        for name, part in sharded.codes.items()
        for i, chunk in enumerate(part.chunks if part.codes is not None else [])
    }
    rounds = {name: part.num_clusterings for name, part in sharded.codes.items()}
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (local, codes, rounds))
    rows = unsharded_rows(plain, None)
    for weights, some_codes, some_rounds in gathered:
        for name, (weight, state) in weights.items():
            rows[name][0].copy_(weight)
            for key, value in state.items():
                if key in rows[name][1]:
                    rows[name][1][key].copy_(value.view_as(rows[name][1][key]))
        for (name, chunk, ids), column in some_codes.items():
            held = plain.codes[name].codes
            held[ids.start : ids.stop, chunk] = column.to(held.dtype)
        for name, number in some_rounds.items():
            plain.codes[name].set_clusterings(number)


def compare(sharded, plain, exact):
    check = torch.equal if exact else lambda a, b: torch.allclose(a, b, rtol=1e-5, atol=1e-6)
    rows = unsharded_rows(plain, None)
    for name, (weight, state) in fused_rows(sharded).items():
        assert check(weight, rows[name][0]), name
        for key, value in state.items():
            if key in rows[name][1]:
                assert check(value, rows[name][1][key].view_as(value)), (name, key)
    for name, part in sharded.codes.items():
        assert part.num_clusterings == plain.codes[name].num_clusterings
        if part.codes is None:
            continue
        own = plain.codes[name].codes[part.ids.start : part.ids.stop, part.chunks]
        assert torch.equal(part.codes, own), name


def train(sharded_model, plain, weighted, seeds, rank, world_size):
    for seed in seeds:
        batches = [batch(seed * 10 + r, weighted) for r in range(world_size)]
        out = sharded_model(batches[rank]).wait()
        expected = [plain(b).values() for b in batches]
        torch.testing.assert_close(out.values(), expected[rank], rtol=1e-5, atol=1e-6)
        assert out.keys() == ["f@t", "g", "h@p", "f@p", "h@u"]
        out.values().square().sum().backward()
        torch.stack([e.square().sum() for e in expected]).mean().backward()


def ids_on_the_network(rank, world_size):
    """Ids that arrive at all ranks, for chunks together and spread, and the ids sent."""
    counts = {}
    for plan_kind in ("tw", "cw"):
        model = Model(collection(PoolingType.SUM, False, "sgd"))
        plan = make_plan(model, tables(PoolingType.SUM), CPU, plan_kind)
        model = DistributedModelParallel(
            model, device=CPU, plan=plan, sharders=get_default_sharders()
        )
        sharded = model.module.collection
        context = sharded.create_context()
        kjt = batch(rank, False)
        arrived = sharded.input_dist(context, kjt).wait().wait()
        received = sum(features.values().numel() for features in arrived)
        owners = {name: len(set(ranks)) for name, ranks in sharded.chunk_owners.items()}
        jagged = kjt.to_dict()
        wanted = sum(
            jagged[feature].values().numel() * owners.get(config.name, 1)
            for config in tables(PoolingType.SUM)
            for feature in config.feature_names
        )
        totals = torch.tensor([received, wanted])
        dist.all_reduce(totals)
        counts[plan_kind] = (*totals.tolist(), owners)
    return counts


def failing_step(rank, world_size):
    """A NaN on one rank: every rank raises, and no table of any rank changes."""
    model = Model(collection(PoolingType.SUM, False, "rowwise"))
    plan = make_plan(model, tables(PoolingType.SUM), CPU, "cw")
    model = DistributedModelParallel(model, device=CPU, plan=plan, sharders=get_default_sharders())
    sharded = model.module.collection
    rows = fused_rows(sharded)
    if "t#0" in rows:
        rows["t#0"][0][0, 0] = float("nan")
    before = {n: (w.clone(), sharded) for n, (w, _) in rows.items()}
    codes = {n: part.codes.clone() for n, part in sharded.codes.items()}
    with pytest.raises(ValueError, match=r"table 't', chunk 0: .*not finite"):
        cluster(model)
    for name, (weight, _) in before.items():
        assert torch.equal(weight.nan_to_num(), rows[name][0].nan_to_num())
    for name, part in sharded.codes.items():
        assert part.num_clusterings == 0 and torch.equal(part.codes, codes[name])


def bad_collectives(rank, world_size):
    """Ranks that disagree, and an option that fails on one rank only: an error on every rank."""
    points = torch.randn(10 + rank, 4)
    with pytest.raises(ValueError, match="ranks disagree"):
        kmeans(points, 3, process_group=dist.group.WORLD)
    with pytest.raises(ValueError, match="ranks disagree"):
        kmeans(points[:10], 3 + rank, process_group=dist.group.WORLD)
    for number, message in ((float("nan"), "rank 1: .*not finite"), (0.0, "rank 1: .*clusters 0")):
        k = 0 if rank == 1 and number == 0.0 else 3
        points[0, 0] = number if rank == 1 else 1.0
        with pytest.raises(ValueError, match=message):
            kmeans(points[:10], k, process_group=dist.group.WORLD)
    with pytest.raises(ValueError, match=r"rank 1: .*non-empty"):
        kmeans(points[:0] if rank == 1 else points, 3, process_group=dist.group.WORLD)
    model = Model(collection(PoolingType.SUM, False, "rowwise"))
    plan = make_plan(model, tables(PoolingType.SUM), CPU, "tw")
    model = DistributedModelParallel(model, device=CPU, plan=plan, sharders=get_default_sharders())
    for unlike in ({"iterations": 1 + rank}, {"tolerance": rank / 10}):
        with pytest.raises(ValueError, match="ranks disagree about the options"):
            cluster(model, **unlike)
    weights = {"t": torch.ones(300 if rank == 0 else 7).long()}
    with pytest.raises(ValueError, match=r"rank [01]: table 't': weights|rank [01]: iterations"):
        cluster(model, weights={"t": weights["t"][:7]}, iterations=6 if rank else 0)


def from_meta(rank, world_size):
    """A model on meta: codes are the hash and codebooks have their scale once it is sharded."""
    made = CCEEmbeddingBagCollection(tables=tables(PoolingType.SUM), device="meta")
    apply_optimizer_in_backward(torch.optim.SGD, list(made.parameters()), {"lr": 0.1})
    model = Model(made)
    plan = make_plan(model, tables(PoolingType.SUM), CPU, "auto")
    model = DistributedModelParallel(model, device=CPU, plan=plan, sharders=get_default_sharders())
    sharded = model.module.collection
    reference = collection(PoolingType.SUM, False, "sgd")
    for name, part in sharded.codes.items():
        assert torch.equal(part.codes, reference.codes[name].codes[:, part.chunks])
    for name, (weight, _) in fused_rows(sharded).items():
        like = unsharded_rows(reference, None)[name][0]
        assert weight.abs().max() <= 1.01 * like.abs().max() or weight.numel() < 500
        assert float(weight.std()) == pytest.approx(float(like.std()), rel=0.3)
    model(batch(rank, False)).wait().values().sum().backward()


def save_and_load(rank, world_size):
    """State of a clustered model into a fresh one, same ranks and plan: equal, and trains on."""

    def build():
        torch.manual_seed(rank)
        model = Model(collection(PoolingType.MEAN, False, "rowwise"))
        plan = make_plan(model, tables(PoolingType.MEAN), CPU, "cw")
        return DistributedModelParallel(
            model, device=CPU, plan=plan, sharders=get_default_sharders()
        )

    model, other = build(), build()
    model(batch(rank, False)).wait().values().sum().backward()
    cluster(model)
    other.load_state_dict(model.state_dict())
    other.fused_optimizer.load_state_dict(model.fused_optimizer.state_dict())
    for _ in range(2):
        outputs = [m(batch(7 + rank, False)).wait().values() for m in (model, other)]
        assert torch.equal(*outputs)
        for out in outputs:
            out.square().sum().backward()
        reports = [cluster(m) for m in (model, other)]
        after = [[c.objective_after for c in r.chunks] for r in reports]
        assert after[0] == after[1]


def several_collections_and_groups(rank, world_size):
    """Two collections cluster in one call; a group of one rank clusters that rank's tables."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = collection(PoolingType.SUM, False, "sgd")
            self.second = collection(PoolingType.SUM, False, "sgd")

    report = cluster(Two())
    assert {c.table for c in report.chunks} == {"first.t", "first.u", "second.t", "second.u"}
    alone = [dist.new_group([r]) for r in range(world_size)][rank]
    plain = collection(PoolingType.SUM, False, "sgd")
    if rank == 0:  # nobody else calls: with the default group this would hang
        assert len(cluster(plain, process_group=alone).chunks) == 6


def owner_fails(rank, world_size):
    """An owner that runs out of memory before it shares its pairs: an error everywhere."""
    model = Model(collection(PoolingType.SUM, False, "rowwise"))
    plan = make_plan(model, tables(PoolingType.SUM), CPU, "tw")
    model = DistributedModelParallel(model, device=CPU, plan=plan, sharders=get_default_sharders())
    usual, find_pairs = plans.SHARE_FROM, owned.find_pairs

    def fails(*_):
        raise MemoryError("no memory")

    plans.SHARE_FROM, owned.find_pairs = 0, fails
    before = {n: w.clone() for n, (w, _) in fused_rows(model.module.collection).items()}
    with pytest.raises(ValueError, match=r"^table '[tu]', chunk [0-3]: rank [01]: no memory$"):
        cluster(model)
    plans.SHARE_FROM, owned.find_pairs = usual, find_pairs
    for name, (weight, _) in fused_rows(model.module.collection).items():
        assert torch.equal(weight, before[name])
    cluster(model)  # the group still works


def write_fails(rank, world_size):
    """A write that fails on one rank is told to every rank, which says what to do."""
    model = Model(collection(PoolingType.SUM, False, "rowwise"))
    plan = make_plan(model, tables(PoolingType.SUM), CPU, "cw")
    model = DistributedModelParallel(model, device=CPU, plan=plan, sharders=get_default_sharders())
    usual = step.commit

    def fails(*_):
        raise OSError("no space")

    if rank == 1:
        step.commit = fails
    with pytest.raises(RuntimeError, match=r"no space.*restore the last checkpoint"):
        cluster(model)
    step.commit = usual


def compiled_model(rank, world_size):
    """torch.compile of a sharded model trains as the eager one, bit for bit."""
    compiles = torch.__version__ >= "2.13"  # TorchRec's own is not trained by 2.11 on two ranks.
    sharded, outputs = [], []
    for called in (
        lambda model: model,
        lambda model: torch.compile(model, backend="eager", disable=not compiles),
    ):
        torch.manual_seed(0)
        model = Model(collection(PoolingType.SUM, False, "rowwise"))
        plan = make_plan(model, tables(PoolingType.SUM), CPU, "tw")
        model = DistributedModelParallel(
            model, device=CPU, plan=plan, sharders=get_default_sharders()
        )
        sharded.append(model.module.collection)
        for seed in range(2):
            out = called(model)(batch(seed + rank, False)).values()
            out.square().sum().backward()
        outputs.append(out)
    assert torch.equal(*outputs)
    eager, compiled = (fused_rows(module) for module in sharded)
    assert all(torch.equal(eager[name][0], compiled[name][0]) for name in eager)


def everything(rank, world_size):
    compiled_model(rank, world_size)
    failing_step(rank, world_size)
    bad_collectives(rank, world_size)
    owner_fails(rank, world_size)
    write_fails(rank, world_size)
    from_meta(rank, world_size)
    save_and_load(rank, world_size)
    several_collections_and_groups(rank, world_size)
    return ids_on_the_network(rank, world_size)


@pytest.fixture(scope="module")
def two_ranks():
    return run_ranks(2, everything)


def test_ids_cross_the_network_once_per_owning_rank(two_ranks):
    for counts in two_ranks:
        for plan_kind in ("tw", "cw"):
            received, wanted, owners = counts[plan_kind]
            assert received == wanted
            assert (max(owners.values()) == 1) == (plan_kind == "tw")
