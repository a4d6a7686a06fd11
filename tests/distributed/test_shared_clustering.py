"""A clustering step gives the same bytes on 1, 2 and 3 ranks, however its work is shared out."""

from __future__ import annotations

import contextlib
import hashlib
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from cce_torchrec.clustering import budget, cluster, plan
from cce_torchrec.clustering.local_chunks import fused_rows
from cce_torchrec.kmeans import backends, scan
from tests.support.models import SUM, Model, collection, shard, tables
from tests.support.ranks import on_ranks

WAYS = {
    "pairs": {},
    "list": {"samples_per_centroid": 10**6},
    "sample": {"samples_per_centroid": 2},
    "torch": {"samples_per_centroid": 2, "backend": "torch"},
}
"""Ways to find the pairs: a table over all, a list of all ids', a sample of ids."""

USUAL = plan.SHARE_FROM
CASES = [("pairs", "tw", USUAL, True)]
"""Way, plan, scores from which ranks share a chunk (0: all), whether new codes are kept."""
for _way in ("pairs", "list", "sample"):
    CASES += [(_way, "tw", 0, True), (_way, "cw", 0, False)]
CASES += [("torch", "cw", 0, True)]


def metric():
    g = torch.Generator().manual_seed(9)
    halves = {"t": torch.randn(4, 4, 4, generator=g), "u": torch.randn(2, 4, 4, generator=g)}
    return {name: half @ half.transpose(1, 2) for name, half in halves.items()}


@contextlib.contextmanager
def small_blocks(share_from, keep_codes):
    """Blocks small enough that every rank scores some of every chunk."""
    memory = plan.Plan.memory

    def nothing_waits(self, limit):
        return memory(self, limit)[0], []

    with contextlib.ExitStack() as stack:
        for module, name, value in [
            (scan, "BLOCK", 64), (backends, "BLOCK", 64), (budget, "ASSIGN_BLOCK", 512),
            (plan, "SHARE_FROM", share_from),
        ]:  # fmt: skip
            stack.enter_context(mock.patch.object(module, name, value))
        if not keep_codes:
            stack.enter_context(mock.patch.object(plan.Plan, "memory", nothing_waits))
        yield


def digest(*tensors):
    return hashlib.sha256(b"".join(t.contiguous().numpy().tobytes() for t in tensors)).hexdigest()


def build(plan_kind):
    """A model whose state no rank number enters, and its sharded collection."""
    model = shard(Model(collection(tables(SUM))), tables(SUM), plan_kind)
    sharded = model.module.collection
    for name, (weight, state) in sorted(fused_rows(sharded).items()):
        g = torch.Generator().manual_seed(sum(map(ord, name)))
        weight.copy_(torch.randn(weight.shape, generator=g))
        for value in state.values():
            value.copy_(torch.rand(value.shape, generator=g))
    return model, sharded


def digests(model, sharded, **options):
    """Of codebooks, optimizer state and codes of all chunks after two steps."""
    for _ in range(2):
        report = cluster(model, **options)
    local = {
        name: digest(weight, *state.values())
        for name, (weight, state) in fused_rows(sharded).items()
    }
    for name, part in sharded.codes.items():
        for i, chunk in enumerate(part.chunks):
            local[f"{name}@{chunk}"] = digest(part.codes[:, i])
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, local)
    numbers = [(c.objective_after, c.changed) for c in report.chunks]
    return {k: v for part in everyone for k, v in part.items()} | {"report": numbers}


def digests_of(rank, world_size, case):
    """`digests` of a case, and the most points that this rank scored in one pass."""
    way, plan_kind, share_from, keep_codes = case
    scored, first = [0], scan.Share.__init__

    def noted(self, points, k, group):
        first(self, points, k, group)
        if group is not None:
            scored.append(self.end - self.start)

    model, sharded = build(plan_kind)
    chosen = {**WAYS[way], "metric": metric() if way == "sample" else None}
    with (
        mock.patch.object(scan.Share, "__init__", noted),
        small_blocks(share_from=share_from, keep_codes=keep_codes),
    ):
        return digests(model, sharded, **chosen), max(scored)


@pytest.fixture(scope="module")
def one_rank(rank_pool):
    """Digests of each case on one rank."""
    return {case: rank_pool.run(1, digests_of, case)[0][0] for case in CASES}


@pytest.mark.parametrize("way", ["pairs", "list", "sample"])
def test_codes_that_wait_and_codes_found_again_agree(way, one_rank):
    assert one_rank[way, "tw", 0, True] == one_rank[way, "cw", 0, False]


def test_every_way_finds_pairs_of_its_own(one_rank):
    assert len(one_rank[CASES[0]]) == 4 + 2 + 1 + 4 + 2 + 1
    assert one_rank["pairs", "tw", 0, True] == one_rank["list", "tw", 0, True]
    assert one_rank["pairs", "tw", 0, True] != one_rank["sample", "tw", 0, True]


@on_ranks(2, 3)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_bytes_for_every_number_of_ranks_and_plan(rank, world_size, case, one_rank):
    found, scored = digests_of(rank, world_size, case)
    assert found == one_rank[case]
    # Whoever owns a chunk, every rank scores some of it.
    assert (scored > 0) == (case[2] == 0)
