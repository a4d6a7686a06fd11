"""ROW_WISE over ids: what the common matrices do not show. Mistakes and
failures are in test_row_wise_errors.py, equality with the unsharded module under
all inputs is in test_inputs.py, pipelines in test_pipeline.py."""

from __future__ import annotations

import contextlib
import copy
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torchrec import KeyedJaggedTensor
from torchrec.distributed.types import ShardingEnv

from cce_torchrec import CCEEmbeddingBagConfig
from cce_torchrec.checkpoint import load_checkpoint, save_checkpoint
from cce_torchrec.clustering import cluster, finalize, moves
from cce_torchrec.clustering.plan import Plan
from cce_torchrec.codes.chunk_codes import codes_of
from cce_torchrec.codes.storage import seen_ids
from cce_torchrec.distributed.code_fetch import CodeFetch
from cce_torchrec.distributed.embedding_bag_sharder import CCEEmbeddingBagCollectionSharder
from cce_torchrec.distributed.id_partition import IdPartition
from cce_torchrec.planning import make_plan, plan_report
from cce_torchrec.table import tables_of
from tests.support.clustering import told_of
from tests.support.models import CPU, Model, batch, collection
from tests.support.ranks import on_ranks
from tests.support.row_wise import sharded_model, tables
from tests.support.twins import compare, copy_state, train

OPTIONS = {
    "sample": {"samples_per_centroid": 3},
    "seen": {"weights": "seen"},
    "weights": {"weights": {"t": torch.arange(300) % 5}, "init": "main"},
    "metric": {
        "metric": {"t": torch.diag_embed(torch.arange(1.0, 5).repeat(4, 1))}, "init": "k-means++"
    },
    "finalize": {},
    "pairs": {},
}  # fmt: skip
"""Of `cluster`; those of `finalize` are its own."""


@on_ranks(2, 3)
@pytest.mark.parametrize(
    ("way", "found_again"),
    [
        *((way, False) for way in OPTIONS if way != "pairs"),
        *((way, True) for way in ("pairs", "sample", "metric")),
    ],
)
def test_every_way_gives_the_bytes_of_one_process(rank, world_size, way, found_again):
    options = OPTIONS[way]
    configs = tables()[:1] if way == "seen" else tables()
    model, plain = sharded_model(configs=configs), collection(configs)
    copy_state(model.module.collection, plain)
    if way == "seen":  # each rank sees ids of its own; the twin sees all
        for r in range(world_size):
            plain(batch(r, False))
        model(batch(rank, False)).wait()
    else:
        train(model, plain, (1, 2))
    copy_state(model.module.collection, plain)
    step = finalize if way == "finalize" else cluster
    # One rank has room for the new codes and the others have none, so all find them again.
    without_room = mock.patch.object(
        Plan, "memory", lambda self, limit: (0, list(self.row_wise) if rank == 0 else [])
    )
    # Pairs of old and new codes are in a list then, and in a table in the twin.
    listed = mock.patch.multiple(moves, _DENSE=0, _SAMPLED=10**6)
    with contextlib.ExitStack() as stack:
        for patch in (without_room, listed) if found_again else ():
            stack.enter_context(patch)
        report = step(model, **options)
    other = step(plain, **options)
    told, expected = ([told_of(chunk) for chunk in r.chunks] for r in (report, other))
    assert told == expected, (told, expected)
    compare(model.module.collection, plain, exact=True)
    if way != "seen":
        train(model, plain, (3,))


@on_ranks(2)
@pytest.mark.parametrize("weighted", [False, True])
def test_lists_of_pairs_are_those_of_one_process(rank, world_size, weighted):
    """Pairs that hardly repeat are listed, not counted, and merged by the owner."""
    config = CCEEmbeddingBagConfig(
        name="t", num_embeddings=5000, embedding_dim=8, feature_names=["f"], num_rows=1500,
        num_chunks=2,
    )  # fmt: skip
    options = {"weights": {"t": torch.arange(5000) % 3}} if weighted else {}
    model, plain = sharded_model(configs=[config]), collection([config])
    copy_state(model.module.collection, plain)
    cluster(model, **options)
    cluster(plain, **options)
    compare(model.module.collection, plain, exact=True)


@on_ranks(2)
def test_distinct_ids_cross_the_network_once(rank, world_size):
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


@on_ranks(2)
def test_ids_are_seen_when_they_are_looked_up(rank, world_size):
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


@on_ranks(2)
def test_loaded_after_it_was_distributed(rank, world_size):
    """A batch that a pipeline distributed before a load is looked up by what was loaded."""
    model, other = sharded_model(), sharded_model()
    cluster(other)
    sharded, kjt = model.module.collection, batch(rank, False)
    context = sharded.create_context()
    arrived = sharded.input_dist(context, kjt).wait().wait()
    model.load_state_dict(other.state_dict())
    out = sharded.compute_and_output_dist(context, arrived).wait()
    assert torch.equal(out.values(), other(kjt).wait().values())


@on_ranks(2)
def test_clustered_before_it_is_sharded(rank, world_size):
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
        assert torch.equal(codes.unpacked, plain.codes["t"].unpacked[own])
        assert torch.equal(seen_ids(codes.seen, len(codes.ids)), bits[own])
    compare(loaded.module.collection, plain, exact=True)
    share = next(t for t in plan_report(model, plan, world_size).tables if t.rank == rank)
    assert share.code_bytes == codes.codes.nbytes + codes.seen.nbytes


def evaluated(model):
    """Outputs of a batch, whose ids are not marked as seen."""
    model.eval()
    with torch.no_grad():
        out = model(batch(3, False))
    model.train()
    return (out.wait() if hasattr(out, "wait") else out).values().numpy()


def save_jobs(rank, world_size, folder, kinds):
    """A checkpoint of each kind of plan: its outputs and the ids that it saw."""
    saved = {}
    for kind in kinds:
        model = sharded_model(kind)
        for seed in (1, 2):
            model(batch(seed, False)).wait().values().square().sum().backward()
        cluster(model)
        model(batch(5, False)).wait().values().square().sum().backward()
        where = f"{folder}/{kind}{world_size}"
        save_checkpoint(where, model, step=1)
        ids = torch.cat([batch(5, False)[f].values() for f in ("f", "g")]).unique()
        seen = torch.zeros(300, dtype=torch.uint8).index_fill_(0, ids, 1)
        saved[where] = (evaluated(model), seen.numpy())  # tensors would die with the rank
    return saved


@pytest.fixture(scope="module")
def saved(rank_pool, tmp_path_factory):
    """Checkpoints of jobs with codes spread by ids, and by chunks."""
    folder = str(tmp_path_factory.mktemp("row_wise"))
    two = rank_pool.run(2, save_jobs, folder, ["rw", "cw"])[0]
    return two | rank_pool.run(3, save_jobs, folder, ["rw"])[0]


LOADED = [(1, "unsharded"), (2, "rw"), (2, "tw"), (3, "rw"), (3, "tw")]


@pytest.mark.parametrize("num_embeddings", [300, 1001])
@pytest.mark.parametrize(("world_size", "kind"), LOADED)
def test_checkpoints_of_other_jobs(rank_pool, world_size, kind, num_embeddings, saved):
    rank_pool.run(world_size, load_jobs, kind, num_embeddings, saved)


def load_jobs(rank, world_size, kind, num_embeddings, saved):
    """Loads every checkpoint; table t had 300 ids, and new ones have their hash."""
    configs = tables(num_embeddings)
    grow = ["t"] if num_embeddings > 300 else []
    for where, (expected, seen) in saved.items():
        unsharded = kind == "unsharded"
        model = Model(collection(configs)) if unsharded else sharded_model(kind, configs)
        report = load_checkpoint(where, model, grow=grow)
        assert not [line for line in report.dropped if "random" not in line], report.dropped
        assert np.array_equal(evaluated(model), expected)
        codes = codes_of(getattr(model, "module", model).collection.codes, "t")
        if codes is None:
            continue
        old = torch.from_numpy(seen)[codes.ids.start : min(codes.ids.stop, 300)]
        bits = seen_ids(codes.seen, len(codes.ids))
        assert torch.equal(bits[: len(old)], old) and not bits[len(old) :].any()
        first, fresh = max(300, codes.ids.start), collection(configs).codes["t"].unpacked
        new = codes.unpacked[first - codes.ids.start :]
        assert torch.equal(new, fresh[first : codes.ids.stop, codes.chunks][: len(new)])


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
    assert CodeFetch.from_partitions(tables_of(tables()), torch.nn.ModuleDict(), {}, None) is None
    kjt = KeyedJaggedTensor(keys=["f"], values=torch.arange(2), lengths=torch.ones(2).long())
    assert kjt.keys() == ["f"]
