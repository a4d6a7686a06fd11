"""What is computed anew for a batch that a change of codes overtook, and what is not."""

import copy

import pytest
import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from torch import nn
from torchrec import KeyedJaggedTensor
from torchrec.distributed.embedding_types import KJTList

from cce_torchrec import CCEEmbeddingBagConfig
from cce_torchrec.clustering import cluster
from cce_torchrec.codes.chunk_codes import ChunkCodes
from cce_torchrec.codes.storage import seen_ids
from cce_torchrec.distributed.batch_in_flight import BatchInFlight, CacheResets
from cce_torchrec.lookup.bounds import BoundsCheck
from cce_torchrec.table import Table
from tests.distributed.test_pipeline import build
from tests.distributed.test_sharded import batch
from tests.support.ranks import run_ranks

WARNING, IGNORE = BoundsCheckMode.WARNING, BoundsCheckMode.IGNORE
NONE = BoundsCheckMode.NONE


def ids(*values):
    return KeyedJaggedTensor(["f"], torch.tensor(values), lengths=torch.ones(len(values)).long())


def some_codes():
    config = CCEEmbeddingBagConfig(
        name="t", num_embeddings=20, embedding_dim=8, feature_names=["f"], num_rows=4,
        num_helper_rows=4, num_chunks=2, track_seen=True,
    )  # fmt: skip
    return ChunkCodes(Table(config), range(2), torch.device("cpu"))


def in_flight(codes):
    """A batch of a ROW_WISE table."""
    return BatchInFlight([codes], [codes], CacheResets())


class Steps:
    """Stands for the collection: notes what it is asked for, and how ids are checked."""

    def __init__(self):
        self.done = []

    def rows(self, batch, received, mode=WARNING):
        self.done = []
        return batch.current_rows(
            received,
            BoundsCheck(mode),
            distribute_again=lambda features, check: self.step("distribute", check, features),
            expand=lambda features, check: self.step("expand", check, *features),
            forget_prefetched=lambda: self.done.append("forget"),
        )

    def step(self, name, check, features):
        self.done.append((name, check.mode))
        return KJTList([ids(*(features.values() + 100).tolist())])


def first(rows):
    return rows[0].values().tolist()


@pytest.mark.parametrize("fetches", [False, True])
@pytest.mark.parametrize("prefetches", [False, True])
@pytest.mark.parametrize("overtaken", [False, True])
def test_only_what_is_out_of_date_is_computed_anew(fetches, prefetches, overtaken):
    codes, steps = some_codes(), Steps()
    batch = in_flight(codes)
    received, kept = KJTList([ids(1)]), KJTList([ids(7)])
    if fetches:
        batch.fetched(ids(3), [])
    if prefetches:
        assert batch.prefetched(kept) is kept
    if overtaken:
        codes.set_clusterings(1)
    rows = steps.rows(batch, received)
    if prefetches and not overtaken:
        assert rows is kept and not steps.done
        return
    again = fetches and overtaken
    assert first(rows) == ([203] if again else [101])
    expected = ["forget"] if prefetches else []
    expected += [("distribute", IGNORE)] if again else []
    # Ids that were expanded for a prefetch have been counted by it.
    assert steps.done == [*expected, ("expand", IGNORE if prefetches else WARNING)]


def test_ids_that_are_not_checked_are_not_checked_anew():
    codes, steps = some_codes(), Steps()
    batch = in_flight(codes)
    batch.fetched(ids(3), [])
    codes.set_clusterings(1)
    steps.rows(batch, KJTList([ids(1)]), NONE)
    assert steps.done == [("distribute", NONE), ("expand", NONE)]


def test_a_batch_that_was_fetched_anew_is_up_to_date():
    """Its distribution says so, as `InputDistribution` does."""
    codes, steps = some_codes(), Steps()
    batch = in_flight(codes)
    batch.fetched(ids(3), [])
    codes.set_clusterings(1)
    batch.fetched(ids(3), [])
    steps.rows(batch, KJTList([ids(1)]))
    assert steps.done == [("expand", WARNING)]


def copied(codes):
    codes.clusterings.copy_(torch.tensor(5))


def replaced(codes):
    """By a buffer of the same value, as load_state_dict(assign=True) does it."""
    codes.load_state_dict(copy.deepcopy(codes.state_dict()), assign=True)


def recoded(codes):
    codes.codes.fill_(1)


def uncounted(codes):
    """As an inference tensor, whose writes torch does not count."""
    with torch.inference_mode():
        codes.clusterings = codes.clusterings.clone()


@pytest.mark.parametrize("write", [copied, replaced, recoded, uncounted])
def test_prefetched_rows_notice_whoever_writes_to_the_buffers(write):
    codes, steps = some_codes(), Steps()
    batch = in_flight(codes)
    kept = batch.prefetched(KJTList([ids(7)]))
    if write is uncounted:
        write(codes)
        batch.prefetched(kept)
    else:
        assert steps.rows(batch, KJTList([ids(1)])) is kept
        write(codes)
    steps.rows(batch, KJTList([ids(1)]))
    assert steps.done == ["forget", ("expand", IGNORE)]


def test_rows_prefetched_into_a_cache_that_was_emptied_are_found_anew():
    resets = CacheResets()
    batch, steps = BatchInFlight([], [], resets), Steps()
    batch.prefetched(KJTList([ids(7)]))
    resets.number += 1
    steps.rows(batch, KJTList([ids(1)]))
    assert steps.done == ["forget", ("expand", IGNORE)]


def test_answered_ids_are_seen_at_the_lookup_and_in_training_only():
    codes = some_codes()
    batch = in_flight(codes)
    batch.fetched(ids(3), [(codes, torch.tensor([2, 11]))])
    assert not codes.seen.any()
    Steps().rows(batch, KJTList([ids(1)]))
    assert seen_ids(codes.seen, 20).nonzero().view(-1).tolist() == [2, 11]
    codes.eval().seen.zero_()
    Steps().rows(batch, KJTList([ids(1)]))
    assert not codes.seen.any()


def test_every_tensor_that_is_kept_is_recorded():
    class Recorded:
        def __init__(self):
            self.streams = []

        def record_stream(self, stream):
            self.streams.append(stream)

    batch = in_flight(some_codes())
    batch.record_stream("first")  # nothing is kept yet
    features, rows, positions = Recorded(), Recorded(), Recorded()
    batch.fetched(features, [(nn.Identity(), positions)])
    batch.prefetched(rows)
    batch.record_stream("second")
    assert [kept.streams for kept in (features, rows, positions)] == [["second"]] * 3


def bad_ids_of_a_prefetched_batch(rank, world_size):
    """Two ids out of bounds, of a batch that is prefetched and then overtaken, count as two."""
    for kind in ("tw", "cw", "rw"):
        model = build(kind)[0]
        sharded, kjt = model.module.collection, batch(rank, False)
        at = kjt.offset_per_key()[kjt.keys().index("f")]
        kjt.values()[at : at + 2] = -7
        context = sharded.create_context()
        arrived = sharded.input_dist(context, kjt).wait().wait()
        sharded.prefetch(arrived, ctx=context)
        counted = sharded.num_invalid_ids
        assert counted > 0, kind
        cluster(model)
        sharded.compute_and_output_dist(context, arrived).wait()
        assert sharded.num_invalid_ids == counted, kind


def test_bad_ids_are_counted_once_also_where_a_prefetched_batch_is_overtaken():
    run_ranks(1, bad_ids_of_a_prefetched_batch)
