"""One rank fails inside a chunk that all ranks score: an error on all of them, never a hang.

A rank that waited for one that is gone would raise RuntimeError at the group's timeout of 60 s.
"""

from __future__ import annotations

import contextlib
import itertools
from unittest import mock

import pytest

from cce_torchrec.clustering import cluster, limits, solver
from cce_torchrec.clustering.local_chunks import fused_rows
from cce_torchrec.kmeans import lloyd, scan
from cce_torchrec.kmeans.backends import NativeBackend, TorchBackend
from cce_torchrec.kmeans.points import PairPoints
from tests.support.clustering import WAYS, build, digests, metric, small_blocks
from tests.support.optional import installed
from tests.support.ranks import on_ranks

OWNER, OTHER = 0, 1  # of table t, plan tw

EVERY_RANK = {
    "starting points": (lloyd, "_start", 1, {}),
    "room for sums": (lloyd, "Share", 1, {}),
    "first scan": (NativeBackend, "prepare", 1, {}),
    "a later scan": (NativeBackend, "prepare", 3, {}),
    "scores of blocks": (TorchBackend, "_block", 2, {"backend": "torch"}),
    "sums": (PairPoints, "accumulate", 2, {}),
    "means": (lloyd, "_means", 1, {"metric": metric()}),
    "points of a metric": (PairPoints, "transformed", 2, {**WAYS["sample"], "metric": metric()}),
    "room for new codes": (scan, "Share", 1, WAYS["sample"]),
}
"""What fails, at which call of it, and how the step is called."""
if installed("sklearn"):
    EVERY_RANK["scikit-learn"] = (lloyd, "_sklearn_fit", 1, {"backend": "sklearn-minibatch"})
OWNER_ALONE = {
    "pairs": (solver, "find_pairs", 1, {}),
    "optimizer state": (solver, "new_main_rows", 1, {}),
    "a block of ids": (solver.PairBatch, "from_block", 1, WAYS["sample"]),
    "new helper rows": (solver.Relabelling, "take", 1, {}),
}
OTHERS_ALONE = {"room for points": (PairPoints, "from_integers", 1, {})}
AT_COMMIT = {
    OWNER: {"codebooks": (solver, "codebooks_only", 1, WAYS["sample"])},
    OTHER: {
        "room for new codes": (scan, "Share", 1, WAYS["sample"]),
        "new codes": (scan, "make_backend", 1, {}),
    },
}


@contextlib.contextmanager
def failing(target, name, call):
    """The `call`-th call of `target.name` runs out of memory."""
    usual, calls = getattr(target, name), itertools.count(1)

    def fails(*args, **kwargs):
        if next(calls) == call:
            raise MemoryError
        return usual(*args, **kwargs)

    with mock.patch.object(target, name, fails):
        yield
    assert next(calls) > call, f"{name} was not called {call} times"


def state_of(sharded):
    """Everything that a clustering step may write on this rank."""
    out = {}
    for name, part in sharded.codes.items():
        out |= {f"{name}.{key}": value.clone() for key, value in part.named_buffers()}
    for name, (weight, state) in fused_rows(sharded).items():
        out |= {f"{name}.{key}": value.clone() for key, value in {"": weight, **state}.items()}
    return out


def fail(rank, failed, model, where, error, match):
    target, name, call, options = where
    nothing = contextlib.nullcontext()
    with failing(target, name, call) if rank == failed else nothing, pytest.raises(error) as raised:
        cluster(model, **options)
    assert raised.match(match.format(failed))


BEFORE_THE_COMMIT = [
    *((failed, way) for failed in (OWNER, OTHER) for way in EVERY_RANK),
    *((OWNER, way) for way in OWNER_ALONE),
    *((OTHER, way) for way in OTHERS_ALONE),
]


@on_ranks(2)
@pytest.mark.parametrize(("failed", "way"), BEFORE_THE_COMMIT)
def test_a_failure_before_the_commit_changes_nothing(rank, world_size, failed, way):
    model, sharded = build("tw")
    assert bool(sharded.codes["t"].chunks) == (rank == OWNER)
    before = state_of(sharded)
    where = {**EVERY_RANK, **OWNER_ALONE, **OTHERS_ALONE}[way]
    with small_blocks(share_from=0, keep_codes=True):
        fail(rank, failed, model, where, ValueError, "^table 't', chunk 0: rank {}: MemoryError$")
        for name, value in state_of(sharded).items():
            assert value.equal(before[name]), name
        assert digests(model, sharded) == digests(*build("tw"))  # as if nothing had happened


@on_ranks(2)
def test_a_failure_of_no_chunk_names_none(rank, world_size):
    model, _ = build("tw")
    memory = (limits, "free_share", 1, {})
    with small_blocks(share_from=0, keep_codes=True):
        fail(rank, OTHER, model, memory, ValueError, "^rank {}: MemoryError$")


@on_ranks(2)
@pytest.mark.parametrize(
    ("failed", "way"), [(failed, way) for failed, ways in AT_COMMIT.items() for way in ways]
)
def test_a_failure_at_the_commit_says_to_restore(rank, world_size, failed, way):
    model, _ = build("tw")
    match = "t', chunk 0: rank {}: MemoryError.*restore the last checkpoint"
    with small_blocks(share_from=0, keep_codes=False):
        fail(rank, failed, model, AT_COMMIT[failed][way], RuntimeError, match)
        assert len(cluster(model).chunks) == 6  # the group still works
