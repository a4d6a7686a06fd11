"""The memory of a clustering step: computed before it, and never more when it is made."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from cce_torchrec.clustering.budget import (
    ASSIGN_BLOCK,
    SAMPLES_PER_CENTROID,
    ChunkShape,
    Engine,
    assign_block,
    budget,
)
from cce_torchrec.clustering.gpu_budget import by_id

CHILD = """
import json, sys
from pathlib import Path
import torch
from cce_torchrec import CCEEmbeddingBagCollection, CCEEmbeddingBagConfig
from cce_torchrec.clustering import cluster
from cce_torchrec.kmeans import native

torch.set_num_threads(1)
available = native.available


def model(ids, rows, helper, counted):
    torch.manual_seed(0)
    return CCEEmbeddingBagCollection(tables=[CCEEmbeddingBagConfig(
        name="t", num_embeddings=ids, embedding_dim=16, feature_names=["f"], num_rows=rows,
        num_helper_rows=helper, num_chunks=2, track_seen=True, track_counts=counted)])


def status(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024


def measured(ids, rows, helper=None, counted=False, metric=False, compiled=True, **options):
    native.available = available if compiled else lambda: False
    made = model(ids, rows, helper, counted)
    made.codes["t"].seen[::3] = 7
    if counted:
        made.codes["t"].counts[:-1] = torch.arange(len(made.codes["t"].counts) - 1) % 256
        made.codes["t"].batches.fill_(1)
    if metric:
        options["metric"] = {"t": torch.eye(8).expand(2, 8, 8)}
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    report = cluster(made, iterations=1, **options)
    return status("VmHWM") - before, report.peak_bytes


cluster(model(1000, 8, None, False))  # what a first step loads
print(json.dumps({name: measured(**case) for name, case in json.loads(sys.argv[1]).items()}))
"""
CASES = {
    "all pairs": {"ids": 2_000_000, "rows": 400},
    "seen ids": {"ids": 2_000_000, "rows": 400, "weights": "seen"},
    "a list of all ids": {"ids": 500_000, "rows": 2000},
    "a sample, little memory": {"ids": 2_000_000, "rows": 200, "memory_limit": 90 << 20,
                                "samples_per_centroid": 200},
    "codes found again": {"ids": 4_000_000, "rows": 300, "memory_limit": 64 << 20,
                          "samples_per_centroid": 100},
    "torch": {"ids": 500_000, "rows": 100, "backend": "torch", "compiled": False},
    "counted": {"ids": 1_000_000, "rows": 64, "helper": 100_000, "counted": True},
    "counted, a metric": {"ids": 250_000, "rows": 64, "helper": 30_000, "counted": True,
                          "metric": True},
    "counted, scores": {"ids": 1_000_000, "rows": 16, "helper": 3_000, "counted": True},
    "counted, torch": {"ids": 250_000, "rows": 64, "helper": 30_000, "counted": True,
                       "backend": "torch", "compiled": False},
    "k-means++": {"ids": 500_000, "rows": 300, "init": "k-means++"},
}  # fmt: skip


@pytest.fixture(scope="module")
def measured():
    """By case: bytes taken at the peak, bytes computed."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(CASES)],
        # Freed memory goes back at once, so that resident memory is what is in use.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc")
@pytest.mark.parametrize("name", CASES)
def test_peak_is_at_most_what_was_computed(name, measured):
    taken, computed = measured[name]
    assert taken <= computed <= CASES[name].get("memory_limit", 1 << 30)
    assert taken > 1 << 20, "nothing was measured"


def test_little_memory_leaves_no_room_for_new_codes():
    """The case of codes found again: 2 bytes for each of 8 million codes would not have fitted."""
    case = CASES["codes found again"]
    rows, limit = case["rows"], case["memory_limit"]
    shape = ChunkShape(num_ids=case["ids"], num_rows=rows, helper_rows=3 * rows, dim=8)
    plan = budget(shape, limit, samples_per_centroid=case["samples_per_centroid"])
    assert plan.working_bytes + plan.code_bytes > limit


def test_on_cuda_without_triton_a_block_of_ids_is_counted_as_large_as_it_is():
    shape = ChunkShape(num_ids=10**8, num_rows=2000, helper_rows=2000, dim=16)
    engine = Engine(backend="torch", device="cuda")
    few, block = SAMPLES_PER_CENTROID, assign_block(torch.device("cuda"), 16)
    assert block > ASSIGN_BLOCK
    got = budget(shape, 4 << 30, samples_per_centroid=few, engine=engine).working_bytes
    # Keys, and their sorted form with places: what torch.unique holds of each id, and a code.
    assert got > (8 + 8 + 8 + 4) * block
    shape = replace(shape, num_ids=ASSIGN_BLOCK)
    small = budget(shape, 4 << 30, samples_per_centroid=1, engine=engine).working_bytes
    assert got - small > 100 * (block - ASSIGN_BLOCK)


def test_a_sample_of_as_many_ids_as_there_are_is_all_of_them():
    shape = ChunkShape(num_ids=2**20, num_rows=2**13, helper_rows=2**13, dim=8)
    few = shape.num_ids // shape.num_rows
    assert budget(shape, 1 << 40, samples_per_centroid=few).samples_per_centroid is None
    assert budget(shape, 1 << 40, samples_per_centroid=few - 1).samples_per_centroid == few - 1


def test_on_cuda_codes_of_all_ids_count_where_few_are_sampled():
    shape = ChunkShape(num_ids=10**8, num_rows=16, helper_rows=16, dim=16)
    engine = Engine(device="cuda", triton=True)
    got = budget(shape, 4 << 30, samples_per_centroid=1, engine=engine).working_bytes
    assert got >= by_id(shape.num_ids, shape.dim)
