"""What a chunk is clustered by without this package: blocked `addmm` and `max` over all its ids."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from benchmarks.gpu_parts.timing import wait

T = TypeVar("T")
PROBED = 1 << 19
"""Ids over which sizes of blocks are compared."""


@dataclass
class Rival:
    """Lloyd's iterations over the vectors of ids, [n, s], made before and not counted."""

    x: torch.Tensor
    block: int = 0
    """Ids whose scores are held at once."""

    def iteration(self, centroids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(means of the clusters, sum of the best scores): one pass over all ids."""
        k, half = len(centroids), -0.5 * (centroids * centroids).sum(1)
        turned = centroids.t()
        sums, sizes = torch.zeros_like(centroids), centroids.new_zeros(k)
        best = torch.zeros((), dtype=torch.float64, device=centroids.device)
        ones = centroids.new_ones(self.block)
        for x in self.x.split(self.block):
            score, nearest = torch.addmm(half, x, turned).max(1)
            sums.index_add_(0, nearest, x)
            sizes.index_add_(0, nearest, ones[: len(x)])
            best += score.sum(dtype=torch.float64)
        means = sums / sizes.clamp(min=1)[:, None]
        return torch.where(sizes[:, None] > 0, means, centroids), best

    def assign(self, centroids: torch.Tensor) -> torch.Tensor:
        """Nearest centroid of all ids, int32."""
        half, turned = -0.5 * (centroids * centroids).sum(1), centroids.t()
        out = torch.empty(len(self.x), dtype=torch.int32, device=self.x.device)
        for first in range(0, len(self.x), self.block):
            x = self.x[first : first + self.block]
            out[first : first + self.block] = torch.addmm(half, x, turned).max(1).indices
        return out

    def kmeans(self, start: torch.Tensor, iterations: int) -> torch.Tensor:
        """Centroids after `iterations`, and a final assignment, which is dropped."""
        centroids = start
        for _ in range(iterations):
            centroids, _ = self.iteration(centroids)
        self.assign(centroids)
        return centroids

    def choose_block(self, start: torch.Tensor, sizes: tuple[int, ...]) -> dict[int, float]:
        """Takes the fastest of `sizes`; seconds of a pass over some ids by each."""
        probe, found = Rival(self.x[:PROBED]), {}
        for probe.block in sizes:
            probe.iteration(start)
            found[probe.block], _ = timed(self.x.device, probe.iteration, start)
        self.block = min(found, key=lambda size: found[size])
        return found

    def objective(self, centroids: torch.Tensor) -> float:
        """Sum of squared distances to the nearest centroid, in float32."""
        with precision(tf32=False):
            _, best = self.iteration(centroids)
            squares = sum(x.square().sum(dtype=torch.float64) for x in self.x.split(1 << 20))
        return float(squares - 2 * best)


def timed(device: torch.device, call: Callable[..., T], *args: Any) -> tuple[float, T]:
    """Seconds of a call until the device is done, and what it returned."""
    wait(device)
    began = time.perf_counter()
    result = call(*args)
    wait(device)
    return time.perf_counter() - began, result


@contextmanager
def precision(tf32: bool) -> Iterator[None]:
    """Products of float32 matrices by TF32 or not."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def faiss_seconds(x: torch.Tensor, start: torch.Tensor, iterations: int) -> float | str:
    """Seconds of FAISS's K-means on the GPU and its final assignment, or why there are none."""
    try:
        import faiss
    except ImportError:
        return "faiss is not installed"
    if not hasattr(faiss, "StandardGpuResources"):
        return "this faiss has no GPU form"
    points = x.cpu().numpy()
    k, dim = start.shape
    run = faiss.Kmeans(
        dim,
        k,
        niter=iterations,
        gpu=1,
        max_points_per_centroid=len(points),
        min_points_per_centroid=1,
        seed=0,
    )

    def work() -> None:
        run.train(points, init_centroids=start.cpu().numpy())
        run.index.search(points, 1)

    return timed(x.device, work)[0]
