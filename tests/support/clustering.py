"""Clustering steps in which every rank has some work, and digests of what they give."""

from __future__ import annotations

import contextlib
import hashlib
from unittest import mock

import torch
import torch.distributed as dist

from cce_torchrec.clustering import budget, cluster, moves, plan
from cce_torchrec.clustering.local_chunks import fused_rows
from cce_torchrec.kmeans import backends, scan
from tests.support.models import sharded_tables

WAYS = {
    "pairs": {},
    "list": {"samples_per_centroid": 10**6},
    "sample": {"samples_per_centroid": 2},
    "torch": {"samples_per_centroid": 2, "backend": "torch"},
}
"""Ways to find the pairs: a table over all, a list of all ids', a sample of ids."""


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
        # Pairs of codes in a list, of all ids all the same.
        sparse = [] if keep_codes else [(moves, "_DENSE", 0), (moves, "_SAMPLED", 10**6)]
        for module, name, value in [
            *sparse,
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
    model = sharded_tables(plan_kind)
    fill(model.module.collection)
    return model, model.module.collection


def fill(sharded):
    """Codebooks and optimizer state that depend on their names alone."""
    for name, (weight, state) in sorted(fused_rows(sharded).items()):
        g = torch.Generator().manual_seed(sum(map(ord, name)))
        weight.copy_(torch.randn(weight.shape, generator=g))
        for value in state.values():
            value.copy_(torch.rand(value.shape, generator=g))


def told_of(chunk):
    """All that a report says of a chunk but seconds, and the path of its collection."""
    found = {name: value for name, value in vars(chunk).items() if name != "seconds"}
    return found | {"table": chunk.table.split(".")[-1]}


def digests(model, sharded, **options):
    """Of all state after two steps, and what the last of them told."""
    for _ in range(2):
        report = cluster(model, **options)
    numbers = [told_of(chunk) for chunk in report.chunks]
    return state_digests(sharded) | {"report": numbers}


def state_digests(sharded):
    """Of codebooks, optimizer state and codes of all chunks of all ranks."""
    local = {
        name: digest(weight, *state.values())
        for name, (weight, state) in fused_rows(sharded).items()
    }
    for name, part in sharded.codes.items():
        for i, chunk in enumerate(part.chunks):
            local[f"{name}@{chunk}"] = digest(part.unpacked[:, i])
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, local)
    return {k: v for part in everyone for k, v in part.items()}
