"""Every plan with every kind of input, on 2, 3 and 4 ranks: equal to the unsharded module."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
import torchrec
from torchrec import KeyedJaggedTensor
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.modules.embedding_configs import PoolingType
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper

from cce_torchrec import CCEEmbeddingBagCollection, CCEEmbeddingBagConfig
from cce_torchrec.clustering import cluster
from cce_torchrec.clustering.local_chunks import fused_rows, unsharded_rows
from cce_torchrec.distributed.data_parallel import data_parallel_parameters
from cce_torchrec.distributed.sharders import get_default_sharders
from cce_torchrec.planning import make_plan, make_planner
from tests.support.ranks import run_ranks
from tests.distributed.test_sharded import CPU, KEYS, Model, batch, tables

SUM, MEAN = PoolingType.SUM, PoolingType.MEAN
SIZE = 5
ROWWISE = (torchrec.optim.RowWiseAdagrad, {"lr": 0.1, "eps": 1e-8})


def vbe_batch(seed, weighted):
    """Bags of each feature, fewer or more than the examples; KEYS in another order inside."""
    g = torch.Generator().manual_seed(seed)
    keys = KEYS[::-1]
    sizes = [int(n) for n in torch.randint(1, 2 * SIZE, (len(keys),), generator=g)]
    lengths = torch.randint(0, 4, (sum(sizes),), generator=g)
    total = int(lengths.sum())
    rows = torch.stack([torch.randint(0, n, (SIZE,), generator=g) for n in sizes])
    return KeyedJaggedTensor(
        keys=keys,
        values=torch.randint(0, 40, (total,), generator=g),
        lengths=lengths,
        weights=torch.rand(total, generator=g) if weighted else None,
        stride_per_key_per_rank=[[n] for n in sizes],
        inverse_indices=(KEYS, rows.flip(0)),
    )


def every_example(kjt):
    """The same batch with each example's bag written out."""
    names, inverse = kjt.inverse_indices()
    values, lengths, weights = [], [], []
    for key, jagged in kjt.to_dict().items():
        for bag in inverse[names.index(key)].tolist():
            start, end = jagged.offsets()[bag : bag + 2].tolist()
            values.append(jagged.values()[start:end])
            lengths.append(end - start)
            if jagged.weights_or_none() is not None:
                weights.append(jagged.weights()[start:end])
    return KeyedJaggedTensor(
        keys=kjt.keys(),
        values=torch.cat(values),
        lengths=torch.tensor(lengths),
        weights=torch.cat(weights) if weights else None,
        stride=SIZE,
    )


def plan_on_hosts(model, configs):
    """CCE tables table-column-wise, for which `make_planner` has no word of its own."""
    planner = make_planner(configs, dist.get_world_size(), CPU)
    for config in configs:
        if isinstance(config, CCEEmbeddingBagConfig):
            planner._enumerator._constraints[config.name] = ParameterConstraints(
                sharding_types=["table_column_wise"], min_partition=config.chunk_dim
            )
    return planner.collective_plan(model, get_default_sharders(), dist.group.WORLD)


class Pair:
    """A sharded model and its unsharded twin, with the optimizers of both."""

    def __init__(
        self, kind, data_parallel, pooling, weighted, optimizer=ROWWISE, dense=None, make=None
    ):
        torch.manual_seed(1)
        self.weighted, self.rank = weighted, dist.get_rank()
        self.world_size = dist.get_world_size()
        make = make or (lambda: CCEEmbeddingBagCollection(tables(pooling), is_weighted=weighted))
        made = [make() for _ in range(2)]
        dense = dense or (lambda ps: optimizer[0](ps, **optimizer[1]))
        for one in made:
            fused = [p for n, p in one.named_parameters() if not _of(n, data_parallel)]
            apply_optimizer_in_backward(optimizer[0], fused, dict(optimizer[1]))
        self.module, self.plain = made[0], getattr(made[0], "bags", made[0])
        replicated = {n: p for n, p in made[0].named_parameters() if _of(n, data_parallel)}
        self.plain_optimizer = dense(replicated.values()) if replicated else None
        model = Model(made[1])
        configs = self.plain.embedding_bag_configs()
        if kind == "tcw":
            plan = plan_on_hosts(model, configs)
        else:
            by_rows = ["p"] if kind == "rw, plain ones too" else []
            plan = make_plan(
                model, configs, CPU, kind[:2], data_parallel=data_parallel, row_wise=by_rows
            )
        self.model = DistributedModelParallel(
            model, device=CPU, plan=plan, sharders=get_default_sharders()
        )
        collection = self.model.module.collection
        self.sharded = getattr(collection, "bags", collection)
        own = data_parallel_parameters(self.model)
        assert {n.split(".")[-2] for n in own} == {n.split(".")[-2] for n in replicated}
        optimizers = [("fused", self.model.fused_optimizer)]
        if own:
            optimizers.append(("own", KeyedOptimizerWrapper(own, dense)))
        self.optimizer = CombinedOptimizer(optimizers) if own else None

    def train(self, make, seeds):
        """Compares outputs on the way."""
        for seed in seeds:
            batches = [make(seed * 10 + r, self.weighted) for r in range(self.world_size)]
            expected = [flat(self.module(b)) for b in batches]
            out = flat(self.model(batches[self.rank]).wait())
            torch.testing.assert_close(out, expected[self.rank], rtol=1e-5, atol=1e-6)
            for optimizer in (self.optimizer, self.plain_optimizer):
                if optimizer is not None:
                    optimizer.zero_grad()
            out.square().sum().backward()
            torch.stack([e.square().sum() for e in expected]).mean().backward()
            for optimizer in (self.optimizer, self.plain_optimizer):
                if optimizer is not None:
                    optimizer.step()

    def copy(self):
        """State of the sharded model into its twin on every rank, bit for bit."""
        rows = {
            n: (w.clone(), {k: v.clone() for k, v in state.items()})
            for n, (w, state) in fused_rows(self.sharded, self.optimizer).items()
        }
        codes = {
            (name, chunk, part.ids): part.codes[:, i].long()
            for name, part in self.sharded.codes.items()
            for i, chunk in enumerate(part.chunks)
        }
        rounds = {name: part.num_clusterings for name, part in self.sharded.codes.items()}
        gathered = [None] * self.world_size
        dist.all_gather_object(gathered, (rows, codes, rounds))
        own = unsharded_rows(self.plain, self.plain_optimizer)
        for source, (theirs, columns, numbers) in enumerate(gathered):
            for name, number in numbers.items():
                self.plain.codes[name].set_clusterings(number)
            for name, (weight, state) in theirs.items():
                at = self.rows_of(weight, own[name][0], source)
                own[name][0][at].copy_(weight)
                for key in state.keys() & own[name][1].keys():
                    held = own[name][1][key][at]
                    held.copy_(state[key].view_as(held))
            for (name, chunk, ids), column in columns.items():
                held = self.plain.codes[name].codes
                held[ids.start : ids.stop, chunk] = column.to(held.dtype)

    def rows_of(self, weight, whole, rank):
        """Where the local rows of a plain table that is cut by rows are in all of them."""
        if len(weight) == len(whole):
            return ...
        first = rank * -(-len(whole) // self.world_size)
        return slice(first, first + len(weight))

    def compare(self, exact):
        check = torch.equal if exact else lambda a, b: torch.allclose(a, b, rtol=1e-5, atol=1e-6)
        own = unsharded_rows(self.plain, self.plain_optimizer)
        for name, (weight, state) in fused_rows(self.sharded, self.optimizer).items():
            at = self.rows_of(weight, own[name][0], self.rank)
            assert check(weight, own[name][0][at]), name
            for key in state.keys() & own[name][1].keys():
                assert check(state[key], own[name][1][key][at].view_as(state[key])), (name, key)
        for name, part in self.sharded.codes.items():
            held = self.plain.codes[name].codes[part.ids.start : part.ids.stop, part.chunks]
            assert torch.equal(part.codes, held), name

    def check(self, make):
        """Two steps, a clustering step from equal state, one more step."""
        self.copy()
        self.train(make, (0, 1))
        self.compare(exact=False)
        self.copy()
        sharded = cluster(self.model, optimizer=self.optimizer)
        plain = cluster(self.plain, optimizer=self.plain_optimizer)
        reports = [[(c.chunk, c.objective_after, c.changed) for c in r.chunks]
                   for r in (sharded, plain)]  # fmt: skip
        assert reports[0] == reports[1] and any(changed for *_, changed in reports[0])
        self.compare(exact=True)
        self.train(make, (2,))
        self.compare(exact=False)


def flat(out):
    """Values of all features, in the order of their names."""
    assert list(out.keys()) == ["f@t", "g", "h@p", "f@p", "h@u"]
    if hasattr(out, "values") and hasattr(out, "length_per_key"):
        return out.values()
    return torch.cat([jagged.values().reshape(-1) for jagged in out.values()])


def _of(name, table_names):
    return name.split(".")[-2].split("#")[0] in table_names


PLANS = {
    "together": ("tw", ()),
    "spread": ("cw", ()),
    "spread over a host": ("tcw", ()),
    "data-parallel": ("tw", ("t", "u", "p")),
    "mixed": ("cw", ("u",)),  # t spread, u on every rank, p together
    "codes spread": ("rw", ()),
    "codes and rows spread": ("rw, plain ones too", ()),
    "codes spread, mixed": ("rw", ("u",)),
}


def matrix(rank, world_size):
    for plan, pooling, weighted, make in itertools.product(
        PLANS, [SUM, MEAN], [False, True], [batch, vbe_batch]
    ):
        kind, data_parallel = PLANS[plan]
        if make is vbe_batch and (data_parallel or kind == "rw, plain ones too"):
            continue  # refused below
        try:
            pair = Pair(kind, data_parallel, pooling, weighted)
            owners = [len(set(ranks)) for ranks in pair.sharded.chunk_owners.values()]
            assert (max(owners, default=1) > 1) == (kind != "tw" and world_size > 1)
            ids = [len(part.ids) for part in pair.sharded.codes.values()]
            assert kind[:2] != "rw" or min(ids) < 300 or world_size == 1
            pair.check(make)
            if data_parallel or kind == "rw, plain ones too":
                why = "are data-parallel, for which TorchRec has|are cut by rows, for which gloo"
                with pytest.raises(ValueError, match=why):
                    pair.model(vbe_batch(rank, weighted))
        except Exception as error:
            case = f"{plan}, {pooling}, weighted={weighted}, {make.__name__}"
            raise AssertionError(case) from error


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_sharded_equals_unsharded(world_size):
    run_ranks(world_size, matrix)
