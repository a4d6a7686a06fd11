"""What only a CUDA device shows: waits, sums by atomics, TF32, FAISS and pinned pipelines."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

from cce_torchrec.clustering.exact_sums import weighted_sums
from cce_torchrec.kmeans import kmeans
from cce_torchrec.kmeans.plus_plus import plus_plus
from tests.support.run_folder import lines_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def test_plus_plus_does_not_wait_in_its_loop():
    sample = torch.randn(3200, 16, generator=torch.Generator().manual_seed(0))
    on_gpu = sample.cuda()
    expected = plus_plus(sample, 100)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="synchronizing") as waits:
            found = plus_plus(on_gpu, 100)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(waits) <= 2  # the draws go to the device
    assert torch.equal(found.cpu(), expected)


def test_sums_of_state_are_those_of_the_cpu_in_any_order():
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(5000, 4, generator=generator).double() ** 30
    rows = torch.randint(5000, (3_000_000,), generator=generator).int()
    weights = torch.randint(1000, rows.shape, generator=generator)
    clusters = torch.randint(300, rows.shape, generator=generator).int()
    points = {"rows": rows, "weights": weights, "clusters": clusters}
    expected = weighted_sums(values, **points, num_clusters=300)
    for order in (torch.arange(len(rows)), torch.randperm(len(rows), generator=generator)):
        moved = {name: part[order].cuda() for name, part in points.items()}
        found = weighted_sums(values.cuda(), **moved, num_clusters=300)
        assert torch.equal(found.cpu(), expected)


def test_a_job_s_tf32_does_not_count():
    x = torch.randn(50_000, 32, generator=torch.Generator().manual_seed(0)).cuda()
    expected = kmeans(x, 500, 3, backend="torch")
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        found = kmeans(x, 500, 3, backend="torch")
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    assert torch.equal(found.assignment, expected.assignment)
    assert torch.equal(found.centroids, expected.centroids)


def test_faiss_finds_what_torch_finds():
    faiss = pytest.importorskip("faiss", reason="faiss is not installed")
    if not hasattr(faiss, "StandardGpuResources"):
        pytest.skip("faiss-gpu is not installed")
    x = torch.randn(50_000, 16, generator=torch.Generator().manual_seed(0)).cuda()
    ours, theirs = (kmeans(x, 100, 3, backend=name) for name in ("torch", "faiss"))
    assert theirs.objective[-1] == pytest.approx(ours.objective[-1], rel=1e-3)


def test_the_training_program_under_every_pipeline(tmp_path):
    """The same losses; a run that a prefetching one saved goes on under the plain loop."""
    found = {}
    for pipeline in ("none", "sparse-dist", "prefetch"):
        command = [
            sys.executable,
            "-m",
            "cce_torchrec.train",
            "--dataset",
            "synthetic",
            "--epochs",
            "1",
            "--batch-size",
            "8192",
            "--clusterings",
            "2",
            "--checkpoint-every",
            "8",
            "--recipe",
            "frequent",
            "--out",
            str(tmp_path / pipeline),
        ]
        runs = [["--pipeline", pipeline]]
        if pipeline == "prefetch":
            runs.append(["--no-pipeline", "--resume"])
        for run in runs:
            done = subprocess.run(
                [*command, *run], capture_output=True, text=True, env=dict(os.environ), timeout=300
            )
            assert done.returncode == 0, done.stderr[-3000:]
            epochs = lines_of(tmp_path / pipeline, "epoch")
            found[(pipeline, *run)] = epochs[-1]["val_log_loss"]
            saved = sorted((tmp_path / pipeline / "checkpoints").glob("step-*"))
            for later in saved[1:]:  # as if killed after the first
                shutil.rmtree(later)
    first = next(iter(found.values()))
    assert all(loss == pytest.approx(first, rel=1e-4) for loss in found.values()), found
