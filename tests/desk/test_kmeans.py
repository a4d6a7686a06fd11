"""K-means on the device by every backend that runs there, against the CPU."""

import pytest
import torch

from cce_torchrec.gpu.memory import free_bytes
from cce_torchrec.gpu.usable import unusable
from cce_torchrec.kmeans import PairPoints, TensorPoints, kmeans
from cce_torchrec.kmeans.backends import make_backend
from tests.desk import device
from tests.desk.counts import counting
from tests.desk.emulated import CUDA, on_cpu

pytestmark = pytest.mark.usefixtures("small_blocks")
ON_CUDA = ["torch", "triton"]
CLOSE = 1e-6
"""Relative, of objectives: float32 scores in another order may send a point that lies between two
centroids to the other one."""
K = 12


def points(kind, where="cpu", n=150, dim=8):
    g = torch.Generator().manual_seed(0)
    if kind == "matrix":
        return TensorPoints(torch.randn(n, dim, generator=g).to(where))
    main, helper = torch.randn(20, dim, generator=g), torch.randn(30, dim, generator=g)
    pairs = torch.randperm(600, generator=g)[:n].sort().values
    parts = {
        "a": (pairs // 30).int(),
        "b": (pairs % 30).int(),
        "weights": torch.randint(1, 5, (n,), generator=g),
        "starts": torch.randperm(n, generator=g),
    }
    there = {name: part.to(where) for name, part in parts.items()}
    return PairPoints(main.to(where), helper.to(where), **there)


def both(kind, backend, n=150, **options):
    return (
        kmeans(points(kind, n=n), K, 2, backend="torch", **options),
        kmeans(points(kind, "cuda", n=n), K, 2, backend=backend, **options),
    )


@pytest.mark.parametrize("kind, init", [("matrix", "k-means++"), ("pairs", "random")])
@pytest.mark.parametrize("backend", ON_CUDA)
def test_equals_the_cpu(backend, kind, init):
    cpu, cuda = both(kind, backend, init=init)
    assert cuda.centroids.is_cuda and cuda.assignment.is_cuda
    assert cuda.objective[-1] == pytest.approx(cpu.objective[-1], rel=CLOSE)
    torch.testing.assert_close(on_cpu(cuda.centroids), cpu.centroids)
    assert torch.equal(on_cpu(cuda.sizes), cpu.sizes)


@pytest.mark.parametrize("backend", ["sklearn", "sklearn-minibatch"])
def test_scikit_learn_fits_on_the_host(backend):
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    cpu = kmeans(points("matrix"), K, 2, backend=backend)
    cuda = kmeans(points("matrix", "cuda"), K, 2, backend=backend)
    assert cuda.centroids.is_cuda
    assert cuda.objective[-1] == pytest.approx(cpu.objective[-1], rel=CLOSE)


@pytest.mark.parametrize("backend", ON_CUDA)
def test_with_a_metric_and_centroids_to_start_from(backend):
    g = torch.Generator().manual_seed(1)
    root = torch.randn(8, 8, generator=g)
    start = torch.randn(K, 8, generator=g)
    cpu, cuda = both("pairs", backend, metric=root @ root.t(), init=start)
    assert cuda.objective[-1] == pytest.approx(cpu.objective[-1], rel=CLOSE)
    torch.testing.assert_close(on_cpu(cuda.centroids), cpu.centroids)


def test_auto_is_triton_and_native_is_refused():
    assert make_backend("auto", CUDA).name == "triton"
    with pytest.raises(ValueError, match="runs on the CPU, not on cuda:0"):
        make_backend("native", CUDA)


@pytest.mark.parametrize("backend", ON_CUDA)
def test_fewer_points_than_clusters(backend):
    cpu, cuda = both("matrix", backend, n=5)
    assert cuda.empty_clusters == cpu.empty_clusters == K - 5
    assert cuda.objective[-1] == cpu.objective[-1] == 0


@pytest.mark.parametrize("backend", ON_CUDA)
def test_waits_do_not_grow_with_the_points(backend):
    counted = []
    unusable(CUDA)  # which waits for its first kernel, once a process
    for n in (64, 256):
        x = points("pairs", "cuda", n=n)
        with counting() as counts:
            kmeans(x, K, 2, backend=backend)
        counted.append(counts)
    assert counted[0].num_waits == counted[1].num_waits, f"{counted[0]}\n{counted[1]}"


def test_free_memory_is_the_drivers_and_what_torch_keeps():
    unused = device.RESERVED_BYTES - device.ALLOCATED_BYTES
    assert free_bytes(CUDA) == device.FREE_BYTES + unused
