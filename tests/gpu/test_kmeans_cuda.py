"""K-means and the clustering step on a CUDA device, against the CPU."""

import pytest
import torch

from cce_torchrec import CCEEmbeddingBagCollection, CCEEmbeddingBagConfig
from cce_torchrec.clustering import cluster
from cce_torchrec.kmeans import kmeans

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("dim", [4, 16, 150])
@pytest.mark.parametrize("backend", ["torch", "triton", "auto"])
def test_kmeans_on_cuda_equals_the_cpu(backend, dim):
    x = torch.randn(100_000, dim, generator=torch.Generator().manual_seed(0))
    start = x[:50]
    cpu = kmeans(x, 50, 3, init=start, backend="torch")
    cuda = kmeans(x.cuda(), 50, 3, init=start, backend=backend)
    torch.testing.assert_close(cuda.centroids.cpu(), cpu.centroids, rtol=1e-3, atol=1e-3)
    assert cuda.objective[-1] == pytest.approx(cpu.objective[-1], rel=1e-3)


def test_clustering_step_on_cuda():
    config = CCEEmbeddingBagConfig(
        name="t", num_embeddings=50_000, embedding_dim=32, feature_names=["f"], num_rows=300
    )
    torch.manual_seed(0)
    cpu = CCEEmbeddingBagCollection(tables=[config])
    cuda = CCEEmbeddingBagCollection(tables=[config], device="cuda")
    cuda.load_state_dict(cpu.state_dict())
    one, other = cluster(cpu, backend="torch"), cluster(cuda, backend="torch")
    for a, b in zip(one.chunks, other.chunks, strict=True):
        assert b.objective_after == pytest.approx(a.objective_after, rel=1e-3)
    assert cuda.codes["t"].unpacked.max() < 300
