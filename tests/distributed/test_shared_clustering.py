"""A clustering step gives the same bytes on 1, 2 and 3 ranks, however its work is shared out."""

from __future__ import annotations

import contextlib
import hashlib
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torchrec.distributed import DistributedModelParallel
from torchrec.modules.embedding_configs import PoolingType

from cce_torchrec.clustering import budget, cluster, plan
from cce_torchrec.clustering.local_chunks import fused_rows
from cce_torchrec.distributed.sharders import get_default_sharders
from cce_torchrec.kmeans import backends, scan
from cce_torchrec.planning import make_plan
from tests.distributed.test_sharded import CPU, Model, collection, tables
from tests.support.ranks import run_ranks

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
    model = Model(collection(PoolingType.SUM, False, "rowwise"))
    made = make_plan(model, tables(PoolingType.SUM), CPU, plan_kind)
    model = DistributedModelParallel(model, device=CPU, plan=made, sharders=get_default_sharders())
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


def all_cases(rank, world_size):
    """By case: digests, and the most points that this rank scored in one pass."""
    out, scored = {}, {}
    first = scan.Share.__init__

    def noted(self, points, k, group):
        first(self, points, k, group)
        if group is not None:
            scored[case] = max(scored.get(case, 0), self.end - self.start)

    with mock.patch.object(scan.Share, "__init__", noted):
        for case in CASES:
            way, plan_kind, share_from, keep_codes = case
            model, sharded = build(plan_kind)
            chosen = {**WAYS[way], "metric": metric() if way == "sample" else None}
            with small_blocks(share_from, keep_codes):
                out[case] = digests(model, sharded, **chosen)
    return out, scored


@pytest.fixture(scope="module")
def one_rank():
    return run_ranks(1, all_cases)[0][0]


def test_codes_that_wait_and_codes_found_again_agree(one_rank):
    for way in ("pairs", "list", "sample"):
        assert one_rank[way, "tw", 0, True] == one_rank[way, "cw", 0, False], way
    assert len(one_rank[CASES[0]]) == 4 + 2 + 1 + 4 + 2 + 1
    assert one_rank["pairs", "tw", 0, True] == one_rank["list", "tw", 0, True]
    assert one_rank["pairs", "tw", 0, True] != one_rank["sample", "tw", 0, True]


@pytest.mark.parametrize("world_size", [2, 3])
def test_same_bytes_for_every_number_of_ranks_and_plan(world_size, one_rank):
    ranks = run_ranks(world_size, all_cases)
    for case, got in ranks[0][0].items():
        assert got == one_rank[case], case
    for case in CASES:  # whoever owns a chunk, every rank scores some of it
        sharing = case[2] == 0
        assert all((scored.get(case, 0) > 0) == sharing for _, scored in ranks), case
