"""ROW_WISE over ids: what the common matrices do not show. Mistakes and
failures are in test_row_wise_errors.py, equality with the unsharded module under
all inputs is in test_sharded.py and test_inputs.py, pipelines in test_pipeline.py."""

from __future__ import annotations

import contextlib
import copy
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torchrec import KeyedJaggedTensor
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.types import ShardingEnv
from torchrec.modules.embedding_configs import PoolingType
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from cce_torchrec import (
    CCEEmbeddingBagCollection,
    CCEEmbeddingBagConfig,
)
from cce_torchrec.checkpoint import load_checkpoint, save_checkpoint
from cce_torchrec.clustering import cluster, finalize
from cce_torchrec.clustering.plan import Plan
from cce_torchrec.codes.chunk_codes import codes_of
from cce_torchrec.codes.storage import seen_ids
from cce_torchrec.distributed.code_fetch import CodeFetch
from cce_torchrec.distributed.embedding_bag_sharder import CCEEmbeddingBagCollectionSharder
from cce_torchrec.distributed.id_partition import IdPartition
from cce_torchrec.distributed.sharders import get_default_sharders
from cce_torchrec.planning import make_plan, plan_report
from cce_torchrec.table import tables_of
from tests.distributed.test_inputs import ROWWISE
from tests.distributed.test_sharded import CPU, Model, batch, compare, copy_state
from tests.distributed.test_sharded import tables as usual_tables
from tests.support.ranks import run_ranks


def tables(num_embeddings=300):
    """As usual, with bits of seen ids; one table takes raw ids."""
    raw = CCEEmbeddingBagConfig(
        name="raw", num_embeddings=90, embedding_dim=8, feature_names=["f"], num_rows=7,
        num_chunks=2, hash_ids=True,
    )  # fmt: skip
    out = [*usual_tables(PoolingType.SUM), raw]
    out[0].num_embeddings = num_embeddings
    out[0].track_seen = True
    return out


def collection(configs=None, **kwargs):
    made = CCEEmbeddingBagCollection(configs or tables(), **kwargs)
    apply_optimizer_in_backward(ROWWISE[0], list(made.parameters()), dict(ROWWISE[1]))
    return made


def sharded_model(kind="rw", configs=None, **kwargs):
    model = Model(collection(configs, **kwargs))
    configs = model.collection.embedding_bag_configs()
    by_rows = ["p"] if kind == "rw, plain ones too" else []
    plan = make_plan(model, configs, CPU, kind[:2], row_wise=by_rows)
    return DistributedModelParallel(model, device=CPU, plan=plan, sharders=get_default_sharders())


def train(model, plain, seeds, rank, world_size):
    for seed in seeds:
        batches = [batch(10 * seed + r, False) for r in range(world_size)]
        expected = [plain(b).values() for b in batches]
        out = model(batches[rank]).wait().values()
        torch.testing.assert_close(out, expected[rank], rtol=1e-5, atol=1e-6)
        out.square().sum().backward()
        torch.stack([e.square().sum() for e in expected]).mean().backward()


OPTIONS = [
    {"samples_per_centroid": 3},
    {"weights": "seen"},
    {"weights": {"t": torch.arange(300) % 5}, "init": "main"},
    {"metric": {"t": torch.diag_embed(torch.arange(1.0, 5).repeat(4, 1))}, "init": "k-means++"},
]


def options_are_those_of_one_process(rank, world_size):
    """Every way through a clustering step gives the unsharded module's bytes."""
    for options, keep in [
        *((o, True) for o in [*OPTIONS, "finalize"]),
        ({}, False),
        (OPTIONS[0], False),
        (OPTIONS[3], False),
    ]:
        configs = tables()
        if isinstance(options, dict) and options.get("weights") == "seen":
            configs = [configs[0]]
        model, plain = sharded_model(configs=configs), collection(configs)
        if len(configs) > 1:
            copy_state(model.module.collection, plain)
            train(model, plain, (1, 2), rank, world_size)
        else:  # each rank sees ids of its own; the twin sees all
            copy_state(model.module.collection, plain)
            for r in range(world_size):
                plain(batch(r, False))
            model(batch(rank, False)).wait()
        copy_state(model.module.collection, plain)
        step = finalize if options == "finalize" else cluster
        given = {} if options == "finalize" else options
        # One rank has room for the new codes and the others have none, so all find them again.
        found_again = mock.patch.object(
            Plan, "memory", lambda self, limit: (0, list(self.row_wise) if rank == 0 else [])
        )
        with contextlib.nullcontext() if keep else found_again:
            report = step(model, **given)
        other = step(plain, **given)
        assert [(c.chunk, c.objective_after, c.changed, c.ids) for c in report.chunks] == [
            (c.chunk, c.objective_after, c.changed, c.ids) for c in other.chunks
        ], options
        compare(model.module.collection, plain, exact=True)
        if len(configs) > 1:
            train(model, plain, (3,), rank, world_size)


def lists_are_those_of_one_process(rank, world_size):
    """Pairs that hardly repeat are listed, not counted, and merged by the owner."""
    config = CCEEmbeddingBagConfig(
        name="t", num_embeddings=5000, embedding_dim=8, feature_names=["f"], num_rows=1500,
        num_chunks=2,
    )  # fmt: skip
    for options in ({}, {"weights": {"t": torch.arange(5000) % 3}}):
        model, plain = sharded_model(configs=[config]), collection([config])
        copy_state(model.module.collection, plain)
        cluster(model, **options)
        cluster(plain, **options)
        compare(model.module.collection, plain, exact=True)


def crossing_the_network(rank, world_size):
    """Distinct ids go out once, their codes come back; 4 bytes a row go to the codebooks."""
    config = tables()[0]
    config.track_seen = False
    model = sharded_model(configs=[config])
    sharded = model.module.collection
    kjt = batch(rank, False)
    values = [kjt[name].values() for name in config.feature_names]
    distinct = len(torch.cat(values).unique())
    sent = []
    exchange = dist.all_to_all_single

    def counted(*args, **kwargs):  # TorchRec names its arguments
        values = kwargs["input"] if "input" in kwargs else args[1]
        sent.append((values.dtype, values.numel() * values.element_size()))
        return exchange(*args, **kwargs)

    with mock.patch.object(dist, "all_to_all_single", counted):
        arrived = sharded.input_dist(sharded.create_context(), kjt).wait().wait()
    fetched = torch.tensor([size for kind, size in sent if kind == torch.uint8][:1])
    dist.all_reduce(fetched)
    wanted = torch.tensor([distinct, sum(len(v) for v in values)])
    dist.all_reduce(wanted)
    ids = [size for kind, size in sent if kind == torch.int64]
    assert ids[:2] == [8 * world_size, 8 * distinct]  # numbers of ids, then the ids
    assert int(fetched) == int(wanted[0]) * config.num_chunks  # uint8 codes
    rows = torch.tensor([sum(f.values().numel() for f in arrived)])
    assert all(f.values().dtype == torch.int32 for f in arrived)
    dist.all_reduce(rows)
    assert int(rows) == int(wanted[1]) * config.num_chunks * 2


def seen_when_looked_up(rank, world_size):
    """A batch that a pipeline distributed before a clustering step: its ids are seen after it.

    They are distributed once more then, and bad ones still counted once.
    """
    model = sharded_model(configs=[tables()[0]])
    sharded = model.module.collection
    context, codes = sharded.create_context(), codes_of(sharded.codes, "t")
    kjt = batch(0, False)
    at = kjt.offset_per_key()[kjt.keys().index("f")]
    kjt.values()[at] = -7
    arrived = sharded.input_dist(context, kjt).wait().wait()
    assert not codes.seen[:-2].any()
    cluster(model)
    sharded.compute_and_output_dist(context, arrived).wait()
    assert sharded.num_invalid_ids == 1
    kjt.values()[at] = 0
    ids = torch.cat([kjt[f].values() for f in ("f", "g")])
    expected = torch.zeros(300, dtype=torch.uint8).index_fill_(0, ids, 1)
    own = expected[codes.ids.start : codes.ids.stop]
    assert torch.equal(seen_ids(codes.seen, len(codes.ids)), own)


def loaded_after_it_was_distributed(rank, world_size):
    """A batch that a pipeline distributed before a load is looked up by what was loaded."""
    model, other = sharded_model(), sharded_model()
    cluster(other)
    sharded, kjt = model.module.collection, batch(rank, False)
    context = sharded.create_context()
    arrived = sharded.input_dist(context, kjt).wait().wait()
    model.load_state_dict(other.state_dict())
    out = sharded.compute_and_output_dist(context, arrived).wait()
    assert torch.equal(out.values(), other(kjt).wait().values())


def clustered_before_it_is_sharded(rank, world_size):
    """Each rank takes its block of codes, and of bits, from a module or the state of one."""
    torch.manual_seed(0)
    config = tables()[0]
    plain, model = collection([config]), Model(collection([config]))
    cluster(plain)
    plain.codes["t"].seen.copy_(torch.arange(config.seen_bytes))
    bits = seen_ids(plain.codes["t"].seen, 300)
    state = copy.deepcopy(Model(plain).state_dict())
    env = ShardingEnv.from_process_group(dist.group.WORLD)
    plan = make_plan(model, [config], CPU, "rw")
    taken = CCEEmbeddingBagCollectionSharder().shard(plain, plan.plan["collection"], env, CPU)
    loaded = sharded_model(configs=[config])
    loaded.load_state_dict(state)
    for sharded in (taken, loaded.module.collection):
        codes = codes_of(sharded.codes, "t")
        own = slice(codes.ids.start, codes.ids.stop)
        assert torch.equal(codes.codes, state["collection.codes.t.codes"][own])
        assert torch.equal(seen_ids(codes.seen, len(codes.ids)), bits[own])
    compare(loaded.module.collection, plain, exact=True)
    share = next(t for t in plan_report(model, plan, world_size).tables if t.rank == rank)
    assert share.code_bytes == codes.codes.nbytes + codes.seen.nbytes


def checkpoints(rank, world_size, folder, save, saved):
    """A ROW_WISE job's checkpoint in every other place, and other jobs' in it; and growth."""

    def outputs(model):
        model.eval()  # marks no ids as seen
        with torch.no_grad():
            out = model(batch(3, False))
        model.train()
        return (out.wait() if hasattr(out, "wait") else out).values()

    def read(model, where, found, **kwargs):
        report = load_checkpoint(where, model, **kwargs)
        assert not [line for line in report.dropped if "random" not in line], report.dropped
        assert np.array_equal(outputs(model).numpy(), found[0])
        codes = codes_of(getattr(model, "module", model).collection.codes, "t")
        if codes is None:
            return
        expected = torch.from_numpy(found[1])[codes.ids.start : min(codes.ids.stop, 300)]
        bits = seen_ids(codes.seen, len(codes.ids))
        assert torch.equal(bits[: len(expected)], expected) and not bits[len(expected) :].any()

    for kind in save:
        model = sharded_model(kind)
        for seed in (1, 2):
            model(batch(seed, False)).wait().values().square().sum().backward()
        cluster(model)
        model(batch(5, False)).wait().values().square().sum().backward()
        where = f"{folder}/{kind}{world_size}"
        save_checkpoint(where, model, step=1)
        ids = torch.cat([batch(5, False)[f].values() for f in ("f", "g")]).unique()
        seen = torch.zeros(300, dtype=torch.uint8).index_fill_(0, ids, 1)
        saved[where] = (outputs(model).numpy(), seen.numpy())  # tensors would die with the rank
    for where, found in saved.items():
        for kind in ("rw", "tw") if world_size > 1 else ("unsharded",):
            model = Model(collection()) if kind == "unsharded" else sharded_model(kind)
            read(model, where, found)
            grown = tables(num_embeddings=1001)
            made = Model(collection(grown)) if kind == "unsharded" else sharded_model(kind, grown)
            read(made, where, found, grow=["t"])
            codes = codes_of(getattr(made, "module", made).collection.codes, "t")
            if codes is not None:
                first, fresh = max(300, codes.ids.start), collection(grown).codes["t"].codes
                new = codes.codes[first - codes.ids.start :]
                assert torch.equal(new, fresh[first : codes.ids.stop, codes.chunks][: len(new)])
    return saved


def two_ranks(rank, world_size, folder):
    options_are_those_of_one_process(rank, world_size)
    lists_are_those_of_one_process(rank, world_size)
    crossing_the_network(rank, world_size)
    seen_when_looked_up(rank, world_size)
    loaded_after_it_was_distributed(rank, world_size)
    clustered_before_it_is_sharded(rank, world_size)
    return checkpoints(rank, world_size, folder, ["rw", "cw"], {})


def three_ranks(rank, world_size, folder, saved):
    options_are_those_of_one_process(rank, world_size)
    return checkpoints(rank, world_size, folder, ["rw"], saved)


def test_row_wise(tmp_path):
    saved = run_ranks(2, two_ranks, str(tmp_path))[0]
    saved = run_ranks(3, three_ranks, str(tmp_path), saved)[0]
    run_ranks(1, checkpoints, str(tmp_path), [], saved)


@pytest.mark.parametrize(("num_embeddings", "ranks"), [(300, 2), (10, 3), (9, 4), (8, 1), (1, 2)])
def test_blocks_hold_every_id_once(num_embeddings, ranks):
    """Equal blocks of whole bytes of bits, the last ones shorter or empty."""
    blocks = IdPartition(num_embeddings, tuple(range(ranks)))
    parts = [blocks.ids(rank) for rank in range(ranks)]
    assert [i for part in parts for i in part] == list(range(num_embeddings))
    assert all(part.start % 8 == 0 for part in parts if part)
    cuts = blocks.cuts(torch.arange(num_embeddings)).tolist()
    assert cuts == [0, *(part.stop for part in parts)]


def test_fetch_needs_no_tables_to_be_absent():
    assert CodeFetch.of(tables_of(tables()), torch.nn.ModuleDict(), {}, None) is None
    kjt = KeyedJaggedTensor(keys=["f"], values=torch.arange(2), lengths=torch.ones(2).long())
    assert kjt.keys() == ["f"]
