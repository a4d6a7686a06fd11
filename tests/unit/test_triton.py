"""The Triton kernel against torch, interpreted on the CPU."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="triton is not installed")

CHECK = """
import torch
from cce_torchrec.kmeans import kmeans
from cce_torchrec.kmeans.triton_kernel import nearest

g = torch.Generator().manual_seed(0)
for n, k, dim in [(1, 1, 4), (63, 64, 8), (65, 130, 16), (200, 5, 32), (70, 65, 20)]:
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
