"""One rank fails inside a chunk that all ranks score: an error on all of them, never a hang.

A rank that waited for one that is gone would raise RuntimeError at the group's timeout of 60 s.
"""

from __future__ import annotations

import contextlib
import itertools
from unittest import mock

import pytest

from cce_torchrec.clustering import cluster, limits, owned
from cce_torchrec.clustering.local_chunks import fused_rows
from cce_torchrec.kmeans import lloyd, scan
from cce_torchrec.kmeans.backends import NativeBackend, TorchBackend
from cce_torchrec.kmeans.points import PairPoints
from tests.distributed.test_shared_clustering import WAYS, build, digests, metric, small_blocks
from tests.support.optional import installed
from tests.support.ranks import run_ranks

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
    "pairs": (owned, "find_pairs", 1, {}),
    "optimizer state": (owned, "new_main_rows", 1, {}),
    "a block of ids": (owned.PairBatch, "of", 1, WAYS["sample"]),
    "new helper rows": (owned.Relabelling, "take", 1, {}),
}
OTHERS_ALONE = {"room for points": (PairPoints, "from_integers", 1, {})}
AT_COMMIT = {
    OWNER: {"codebooks": (owned, "codebooks_only", 1, WAYS["sample"])},
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


def ranks_that_fail(rank, world_size):
    model, sharded = build("tw")
    assert ("t" in sharded.codes) == (rank == OWNER)
    before = state_of(sharded)
    with small_blocks(share_from=0, keep_codes=True):
        for failed, ways in (
            (OWNER, EVERY_RANK), (OTHER, EVERY_RANK), (OWNER, OWNER_ALONE), (OTHER, OTHERS_ALONE),
        ):  # fmt: skip
            for way, where in ways.items():
                try:
                    match = "^table 't', chunk 0: rank {}: MemoryError$"
                    fail(rank, failed, model, where, ValueError, match)
                except BaseException as error:
                    raise AssertionError(f"{way}, on rank {failed}") from error
                for name, value in state_of(sharded).items():
                    assert value.equal(before[name]), (way, name)
        fail(
            rank, OTHER, model, (limits, "free_share", 1, {}), ValueError, "^rank {}: MemoryError$"
        )
        assert digests(model, sharded) == digests(*build("tw"))  # as if nothing had happened
    with small_blocks(share_from=0, keep_codes=False):
        for failed, ways in AT_COMMIT.items():
            for way, where in ways.items():
                try:
                    match = "t', chunk 0: rank {}: MemoryError.*restore the last checkpoint"
                    fail(rank, failed, model, where, RuntimeError, match)
                except BaseException as error:
                    raise AssertionError(f"{way} at the commit, on rank {failed}") from error
        assert len(cluster(model).chunks) == 6


def test_one_of_two_ranks_fails():
    run_ranks(2, ranks_that_fail)
