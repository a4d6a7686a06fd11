"""A sharded model beside its unsharded twin: equal state, equal steps."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper

from cce_torchrec import CCEEmbeddingBagCollection, CCEEmbeddingBagConfig
from cce_torchrec.clustering import cluster
from cce_torchrec.clustering.local_chunks import fused_rows, unsharded_rows
from cce_torchrec.distributed.data_parallel import data_parallel_parameters
from cce_torchrec.distributed.sharders import get_default_sharders
from cce_torchrec.planning import make_plan, make_planner
from tests.support.clustering import told_of
from tests.support.models import CPU, ROWWISE, Model, batch, shard_by, tables


def rows_of(weight, whole, rank):
    """Where the rows that a rank has of a plain table that is cut by rows are in all of them."""
    if len(weight) == len(whole):
        return ...
    first = rank * -(-len(whole) // dist.get_world_size())
    return slice(first, first + len(weight))


def copy_state(sharded, plain, optimizer=None, plain_optimizer=None):
    """Weights and codes of the owners into the unsharded twin on every rank, bit for bit."""
    rows = {
        name: (weight.clone(), {k: v.clone() for k, v in state.items()})
        for name, (weight, state) in fused_rows(sharded, optimizer).items()
    }
    codes = {
        (name, chunk, part.ids): part.unpacked[:, i]
        for name, part in sharded.codes.items()
        for i, chunk in enumerate(part.chunks if part.codes is not None else [])
    }
    clusterings = {name: part.num_clusterings for name, part in sharded.codes.items()}
    counts = {
        (name, part.ids): part.counts.clone()
        for name, part in sharded.codes.items()
        if part.counts is not None and part.chunks
    }
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (rows, codes, clusterings, counts))
    own = unsharded_rows(plain, plain_optimizer)
    for rank, (weights, columns, numbers, counted) in enumerate(gathered):
        for (name, ids), part in counted.items():
            first, used = ids.start // 2, -(-len(ids) // 2)
            plain.codes[name].counts[first : first + used] = part[:used]
        for name, (weight, state) in weights.items():
            at = rows_of(weight, own[name][0], rank)
            own[name][0][at].copy_(weight)
            for key in state.keys() & own[name][1].keys():
                held = own[name][1][key][at]
                held.copy_(state[key].view_as(held))
        for (name, chunk, ids), column in columns.items():
            held = plain.codes[name]
            held.packing.write(held.codes, chunk, ids.start, column)
        for name, number in numbers.items():
            plain.codes[name].set_clusterings(number)


def compare(sharded, plain, optimizer=None, plain_optimizer=None, *, exact):
    """State of this rank's part is that of the twin: codes exactly, rows so if `exact`."""
    check = torch.equal if exact else lambda a, b: torch.allclose(a, b, rtol=1e-5, atol=1e-6)
    own = unsharded_rows(plain, plain_optimizer)
    for name, (weight, state) in fused_rows(sharded, optimizer).items():
        at = rows_of(weight, own[name][0], dist.get_rank())
        assert check(weight, own[name][0][at]), name
        for key in state.keys() & own[name][1].keys():
            assert check(state[key], own[name][1][key][at].view_as(state[key])), (name, key)
    for name, part in sharded.codes.items():
        assert part.num_clusterings == plain.codes[name].num_clusterings
        if part.codes is not None:
            held = plain.codes[name].unpacked[part.ids.start : part.ids.stop, part.chunks]
            assert part.packing == plain.codes[name].packing and torch.equal(part.unpacked, held)


def train(model, plain, seeds, weighted=False, make=batch, optimizers=()):
    """A step a seed on both, of which each rank takes its batch, and the twin the mean of all.

    Outputs are compared on the way; `optimizers` are those that no backward pass steps.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for seed in seeds:
        batches = [make(seed * 10 + r, weighted) for r in range(world_size)]
        outputs = [plain(b) for b in batches]
        expected = [flat(output) for output in outputs]
        out = model(batches[rank]).wait()
        assert list(out.keys()) == list(outputs[rank].keys())
        out = flat(out)
        torch.testing.assert_close(out, expected[rank], rtol=1e-5, atol=1e-6)
        for optimizer in optimizers:
            optimizer.zero_grad()
        out.square().sum().backward()
        torch.stack([e.square().sum() for e in expected]).mean().backward()
        for optimizer in optimizers:
            optimizer.step()


def flat(out):
    """Values of all features, in the order that the collection gives them."""
    if hasattr(out, "values") and hasattr(out, "length_per_key"):
        return out.values()
    return torch.cat([jagged.values().reshape(-1) for jagged in out.values()])


def _of(name, table_names):
    return name.split(".")[-2].split("#")[0] in table_names


def constrained(planner, **constraints):
    """`planner` with TorchRec's constraints, by table, which `make_planner` has no word for."""
    planner._enumerator._constraints.update(constraints)
    return planner


def plan_on_hosts(model, configs):
    """CCE tables table-column-wise."""
    on_hosts = {
        config.name: ParameterConstraints(
            sharding_types=["table_column_wise"], min_partition=config.chunk_dim
        )
        for config in configs
        if isinstance(config, CCEEmbeddingBagConfig)
    }
    planner = constrained(make_planner(configs, dist.get_world_size(), CPU), **on_hosts)
    return planner.collective_plan(model, get_default_sharders(), dist.group.WORLD)


class Pair:
    """A sharded model and its unsharded twin, with the optimizers of both."""

    def __init__(
        self, kind, data_parallel, pooling, weighted, optimizer=ROWWISE, dense=None, make=None
    ):
        torch.manual_seed(1)
        self.weighted = weighted
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
        self.model = shard_by(plan, model)
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
        optimizers = [self.optimizer, self.plain_optimizer] if self.optimizer else []
        train(self.model, self.module, seeds, self.weighted, make, optimizers)

    def copy(self):
        """State of the sharded model into its twin on every rank, bit for bit."""
        copy_state(self.sharded, self.plain, self.optimizer, self.plain_optimizer)

    def compare(self, exact):
        compare(self.sharded, self.plain, self.optimizer, self.plain_optimizer, exact=exact)

    def check(self, make):
        """Two steps, a clustering step from equal state, one more step."""
        self.copy()
        self.train(make, (0, 1))
        self.compare(exact=False)
        self.copy()
        sharded = cluster(self.model, optimizer=self.optimizer)
        plain = cluster(self.plain, optimizer=self.plain_optimizer)
        reports = [[told_of(chunk) for chunk in report.chunks] for report in (sharded, plain)]
        assert reports[0] == reports[1] and any(chunk.changed for chunk in sharded.chunks)
        self.compare(exact=True)
        self.train(make, (2,))
        self.compare(exact=False)
