"""The Triton kernels against torch, interpreted on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

CHECK = """
import torch
from cce_torchrec.kmeans import kmeans
from cce_torchrec.kmeans.triton_kernel import nearest

g = torch.Generator().manual_seed(0)
for n, k, dim in [(1, 1, 4), (63, 64, 8), (65, 130, 16), (200, 5, 32), (70, 65, 20),
                  (66, 70, 150)]:
    x, c = torch.randn(n, dim, generator=g), torch.randn(k, dim, generator=g)
    half_norms = -0.5 * (c * c).sum(1)
    got = nearest(x, c, half_norms)
    scores = x.double() @ c.double().t() + half_norms.double()
    reached = scores[torch.arange(n), got.long()]
    torch.testing.assert_close(reached, scores.max(1).values, rtol=1e-5, atol=1e-5)
    assert torch.equal(nearest(x, c[:1].expand(k, dim).contiguous(), half_norms[:1].expand(k)
        .contiguous()), torch.zeros(n, dtype=torch.int32)), "ties go to the lowest index"
x = torch.randn(300, 8, generator=g)
one, other = (kmeans(x, 7, 5, backend=b) for b in ("triton", "torch"))
torch.testing.assert_close(one.centroids, other.centroids)
"""


def test_interpreted_kernel_equals_torch():
    done = subprocess.run(
        [sys.executable, "-c", CHECK],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]


EXPAND = """
import pytest, torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from cce_torchrec.bounds import BoundsCheck
from cce_torchrec.chunk_codes import ChunkCodes
from cce_torchrec.expand import Expansion
from cce_torchrec.fused import device, native
from tests.unit.test_expand import batch, blocks

parts, slots, keys = blocks()
four = [b for b in parts if b.copies == 4 and b.rows_per_id == 2 and len(b.slots) == 1]
for i, block in enumerate(four):
    block.slots = [i]
alike = Expansion(four, slots[: len(four)], [str(i) for i in range(4 * len(four))])
mixed = Expansion(blocks()[0], slots, keys)
kernel, native.takes = device.takes, lambda ids: False
for expansion, own in ((mixed, slots), (alike, slots[: len(four)])):
    for bad, dtype, weighted in ((None, torch.int64, False), (-1, torch.int32, True)):
        for round_ in (0, 1):
            features, found = batch(own, bad, dtype, 3, weighted), []
            before = features.values().clone()
            for takes in (kernel, lambda ids: False):
                device.takes = takes
                check = BoundsCheck(BoundsCheckMode.WARNING)
                expansion._described = None
                rows = expansion(features, check)
                found.append((rows, check.num_invalid))
            (one, count), (other, other_count) = found
            assert torch.equal(one.values(), other.values())
            assert torch.equal(one.lengths(), other.lengths())
            assert not weighted or torch.equal(one.weights(), other.weights())
            assert count == other_count == (len(before[::7]) if bad is not None else 0)
            assert torch.equal(features.values(), before)
            for block in expansion._blocks:
                if block.codes is not None:
                    block.codes.set_rounds(block.codes.rounds + 1)
device.takes = kernel
check = BoundsCheck(BoundsCheckMode.WARNING)
features = batch(own, -1, torch.int64, 3)
for _ in range(2):
    alike(features, check)
described = alike._described
four[0].codes.set_rounds(9)
alike(features, check)
assert alike._described is not described
assert check.num_invalid == 3 * len(features.values()[::7])
"""


def test_interpreted_expansion_equals_torch():
    done = subprocess.run(
        [sys.executable, "-c", EXPAND],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_compiled_model_falls_back_at_the_kernel():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", str(Path(__file__).with_name("test_compile.py"))],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:]
