"""ROW_WISE over ids: mistakes and failures end in an error on every rank; and the odd tables."""

from __future__ import annotations

import contextlib
import time
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torchrec
from torchrec import KeyedJaggedTensor
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints
from torchrec.modules.embedding_configs import EmbeddingConfig, PoolingType
from torchrec.modules.feature_processor_ import PositionWeightedModule
from torchrec.modules.fp_embedding_modules import FeatureProcessedEmbeddingBagCollection

from cce_torchrec import (
    CCEEmbeddingBagCollection,
    CCEEmbeddingBagConfig,
    CCEEmbeddingCollection,
)
from cce_torchrec.checkpoint import load_checkpoint, save_checkpoint
from cce_torchrec.clustering import cluster, pairs
from cce_torchrec.clustering.id_passes import ChunkIds, NewCodes
from cce_torchrec.clustering.local_chunks import fused_rows
from cce_torchrec.clustering.options import Options
from cce_torchrec.distributed.sharders import get_default_sharders
from cce_torchrec.planning import make_plan, plan_report
from tests.support.models import CPU, Model, batch, collection, shard_by
from tests.support.ranks import on_ranks
from tests.support.row_wise import sharded_model, tables
from tests.support.twins import compare, copy_state, train

FATAL = torchrec.distributed.types.BoundsCheckMode.FATAL


@contextlib.contextmanager
def raised_within(seconds, error, match):
    began = time.monotonic()
    with pytest.raises(error, match=match):
        yield
    assert time.monotonic() - began < seconds


@on_ranks(2)
def test_a_bad_id_on_one_rank_raises_on_all(rank, world_size):
    model = sharded_model(bounds_check_mode=FATAL)
    kjt = batch(rank, False)
    if rank == 1:
        kjt.values()[kjt.offset_per_key()[kjt.keys().index("f")]] = 10**6
    found = "id 1000000 is outside" if rank == 1 else r"batch of ranks \[1\] could not be looked up"
    with raised_within(20, ValueError, found):
        model(kjt)
    model(batch(rank, False)).wait()


FAILING = {
    "pairs": (ChunkIds, "count_pairs", {}),
    "sampled ids": (ChunkIds, "drawn", {}),
    "weights": (Options, "weights_of", {}),
    "sums": (pairs, "_added_up", {"samples_per_centroid": 3}),
    "new codes": (NewCodes, "add_residuals", {}),
}


@on_ranks(2)
@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("what", FAILING)
def test_a_failing_rank_changes_nothing(rank, world_size, what, failing):
    """What fails on one rank, owner of a codebook or not, is raised on all, and nothing hangs."""
    model = sharded_model()
    sharded = model.module.collection
    rows = {n: w.clone() for n, (w, _) in fused_rows(sharded).items()}
    codes = {n: part.codes.clone() for n, part in sharded.codes.items()}

    def unchanged():
        return all(torch.equal(w, rows[n]) for n, (w, _) in fused_rows(sharded).items()) and all(
            torch.equal(part.codes, codes[n]) for n, part in sharded.codes.items()
        )

    owner, method, options = FAILING[what]
    broken = mock.patch.object(owner, method, side_effect=MemoryError("no memory for this"))
    with (
        broken if rank == failing else contextlib.nullcontext(),
        raised_within(20, ValueError, rf"table '.*rank {failing}: no memory for this"),
    ):
        cluster(model, **options)
    assert unchanged()
    cluster(model)
    assert not unchanged()


@on_ranks(2)
def test_a_failing_write_says_to_restore(rank, world_size):
    model = sharded_model()
    broken = mock.patch.object(NewCodes, "write", side_effect=MemoryError("no memory for this"))
    with (
        broken if rank == 1 else contextlib.nullcontext(),
        raised_within(20, RuntimeError, "no memory for this.*restore the last checkpoint"),
    ):
        cluster(model)


# Plans that cannot be: an error with the table and the remedy, on every rank.


@on_ranks(2)
def test_a_plan_without_a_shard(rank, world_size):
    model = Model(collection(tables()))
    plan = make_plan(model, tables(), CPU, "rw")
    plan.plan["collection"]["t"].sharding_spec.shards.pop()
    with pytest.raises(ValueError, match=r"'t': its ROW_WISE plan has shards on ranks \[0\], and"):
        shard_by(plan, model)


@on_ranks(2)
def test_feature_processors_are_refused(rank, world_size):
    made = collection([tables()[2]], is_weighted=True)
    model = Model(FeatureProcessedEmbeddingBagCollection(made, {"h": PositionWeightedModule(4)}))
    plan = make_plan(model, [tables()[2]], CPU, "rw")
    with pytest.raises(ValueError, match=r"tables \['u'\]: feature processors weigh ids"):
        shard_by(plan, model)


@on_ranks(2)
def test_a_group_that_lacks_codes(rank, world_size):
    model = sharded_model()
    alone = [dist.new_group([r]) for r in range(world_size)][rank]
    with pytest.raises(
        ValueError, match=rf"'t', chunk 0: its codes are on ranks \[0, 1\].*\[{rank}\]"
    ):
        cluster(model, process_group=alone)


@on_ranks(2)
def test_plain_tables_of_sequences_are_refused(rank, world_size):
    rows = [EmbeddingConfig(name="e", num_embeddings=50, embedding_dim=8, feature_names=["f"])]
    model = Model(CCEEmbeddingCollection(rows))
    plan = make_plan(model, rows, CPU)
    plan.plan["collection"]["e"].sharding_type = "row_wise"
    with pytest.raises(ValueError, match=r"tables \['e'\]: plain tables of .* ROW_WISE"):
        shard_by(plan, model)


@on_ranks(2)
def test_hashed_tables(rank, world_size):
    """A table without codes, for which our planner has no ROW_WISE and TorchRec's may."""
    hashed = tables()[2]
    hashed.learned_codes = False
    model, plain = Model(collection([hashed])), collection([hashed])
    plan = make_plan(model, [hashed], CPU, "rw")
    assert plan.plan["collection"]["u"].sharding_type == "table_wise"
    planner = EmbeddingShardingPlanner(
        constraints={"u": ParameterConstraints(sharding_types=["row_wise"])}
    )
    sharders = get_default_sharders()
    next(s for s in sharders if s.module_type is CCEEmbeddingBagCollection).offers_row_wise = True
    plan = planner.collective_plan(model, sharders, dist.group.WORLD)
    report = plan_report(model, plan, world_size)
    model = shard_by(plan, model)
    sharded = model.module.collection
    assert set(sharded.chunk_owners["u"]) == {0, 1}
    held = sum(w.nbytes for w, _ in fused_rows(sharded).values())
    share = next(table for table in report.tables if table.rank == rank)
    assert (share.codebook_bytes, share.code_bytes) == (held, 0)
    copy_state(sharded, plain)
    train(model, plain, (1, 2))
    compare(sharded, plain, exact=False)


@on_ranks(2)
def test_few_ids(rank, world_size, tmp_path):
    """One block holds all ids; one rank has the only codebook, and both count its memory."""
    config = CCEEmbeddingBagConfig(
        name="t", num_embeddings=8, embedding_dim=8, feature_names=["h"], num_rows=2, num_chunks=1,
        seed=1,  # with which the second step below samples no id at all
    )  # fmt: skip
    model, plain = sharded_model(configs=[config]), collection([config])
    ids = torch.arange(8) if rank else torch.arange(0)
    kjt = KeyedJaggedTensor(keys=["h"], values=ids, lengths=torch.full((8,), rank))
    out = model(kjt).wait().values()
    out.square().sum().backward()
    copy_state(model.module.collection, plain)
    peaks = [None] * world_size
    for options in ({}, {"samples_per_centroid": 1}):
        report = cluster(model, **options)
        cluster(plain, **options)
        compare(model.module.collection, plain, exact=True)
        dist.all_gather_object(peaks, report.peak_bytes)
        assert min(peaks) > 1 << 20
    save_checkpoint(tmp_path, model, step=1)
    for kind in ("rw", "tw"):
        other = sharded_model(kind, [config])
        load_checkpoint(tmp_path, other)
        assert torch.equal(other(kjt).wait().values(), model(kjt).wait().values())


@on_ranks(2)
@pytest.mark.parametrize("weighted", [False, True])
def test_means_of_plain_tables(rank, world_size, weighted):
    """Of a plain MEAN table that is cut by rows, with and without weights."""
    configs = [tables()[0], tables()[1]]
    configs[1].pooling = PoolingType.MEAN
    model = sharded_model("rw, plain ones too", configs, is_weighted=weighted)
    whole = torch.arange(40.0)[:, None].expand(40, 8)
    for name, (weight, _) in fused_rows(model.module.collection).items():
        if name == "p":
            weight.copy_(whole[20 * rank :][:20])
    kjt = batch(rank, weighted)
    out = model(kjt).wait()
    for name, feature in (("h", "h"), ("f@p", "f")):
        bags, expected = kjt[feature].to_dense(), out[name]
        weights = (
            kjt[feature].to_dense_weights() if weighted else [torch.ones(len(b)) for b in bags]
        )
        for bag, weight, found in zip(bags, weights, expected, strict=True):
            mean = float((bag * weight).sum()) / max(1, len(bag))
            assert torch.allclose(found, torch.full((8,), mean), rtol=1e-5)
