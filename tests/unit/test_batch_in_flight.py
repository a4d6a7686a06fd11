"""What is computed anew for a batch that a change of codes overtook, and what is not."""

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
from cce_torchrec.distributed.batch_in_flight import BatchInFlight
from cce_torchrec.lookup.bounds import BoundsCheck
from cce_torchrec.table import Generation, Table
from tests.distributed.test_pipeline import build
from tests.distributed.test_sharded import batch
from tests.support.ranks import run_ranks

WARNING, IGNORE = BoundsCheckMode.WARNING, BoundsCheckMode.IGNORE
NONE = BoundsCheckMode.NONE


def ids(*values):
    return KeyedJaggedTensor(["f"], torch.tensor(values), lengths=torch.ones(len(values)).long())


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
    generation, steps = Generation(), Steps()
    batch = BatchInFlight(generation)
    received, kept = KJTList([ids(1)]), KJTList([ids(7)])
    if fetches:
        batch.fetched(ids(3), [])
    if prefetches:
        assert batch.prefetched(kept) is kept
    if overtaken:
        generation.advance()
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
    generation, steps = Generation(), Steps()
    batch = BatchInFlight(generation)
    batch.fetched(ids(3), [])
    generation.advance()
    steps.rows(batch, KJTList([ids(1)]), NONE)
    assert steps.done == [("distribute", NONE), ("expand", NONE)]


def test_a_batch_that_was_fetched_anew_is_up_to_date():
    """Its distribution says so, as `InputDistribution` does."""
    generation, steps = Generation(), Steps()
    batch = BatchInFlight(generation)
    batch.fetched(ids(3), [])
    generation.advance()
    batch.fetched(ids(3), [])
    steps.rows(batch, KJTList([ids(1)]))
    assert steps.done == [("expand", WARNING)]


def test_answered_ids_are_seen_at_the_lookup_and_in_training_only():
    config = CCEEmbeddingBagConfig(
        name="t", num_embeddings=20, embedding_dim=8, feature_names=["f"], num_rows=4,
        num_helper_rows=4, num_chunks=2, track_seen=True,
    )  # fmt: skip
    codes = ChunkCodes(Table(config), range(2), torch.device("cpu"))
    batch = BatchInFlight(codes.table.generation)
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

    batch = BatchInFlight(Generation())
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
