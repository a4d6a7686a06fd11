"""The shapes of `benchmarks.kmeans`, the problem each one makes, and who solves it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import faiss
import torch

from cce_torchrec import CCEEmbeddingBagConfig
from cce_torchrec.clustering.budget import ASSIGN_BLOCK, ChunkShape, budget
from cce_torchrec.clustering.chunk_state import ChunkState
from cce_torchrec.clustering.pair_batch import PairBatch, of_all_ids
from cce_torchrec.clustering.pairs import find_pairs
from cce_torchrec.codes.chunk_codes import ChunkCodes
from cce_torchrec.kmeans import kmeans
from cce_torchrec.kmeans.scan import assign
from cce_torchrec.table import Table

CPU = torch.device("cpu")
LIMIT = 1 << 30
ANY = 1 / 1.1
"""Goal for any shape: never more than 1.1 times slower than FAISS."""


@dataclass(frozen=True)
class Shape:
    """One problem. `goal`: least ratio of FAISS's seconds to ours; None: only reported."""

    num_ids: int
    k: int
    k_helper: int
    dim: int
    iterations: int
    goal: float | None = None
    assign_only: bool = False

    @property
    def name(self) -> str:
        """For the table and the plot."""
        kind = "assign" if self.assign_only else f"{self.iterations} it"
        return f"N={self.num_ids:.0e} k={self.k} k'={self.k_helper} s={self.dim} {kind}"

    @property
    def scores(self) -> int:
        """Distances that a peer computes."""
        return self.num_ids * self.k * (self.iterations + 1)


QUICK = [
    Shape(10**5, 256, 256, 16, 5),
    Shape(10**6, 256, 256, 32, 5),
    Shape(10**5, 256, 768, 4, 5),
]
FULL = [
    Shape(10**7, 1024, 1024, 16, 6, 8),
    Shape(10**7, 1024, 3072, 16, 6, 3),
    Shape(10**7, 1024, 1024, 32, 0, 8, assign_only=True),
    *(Shape(10**7, k, 3 * k, s, 1, ANY) for k in (256, 1024) for s in (4, 16, 32)),
    *(Shape(10**7, 4096, 3 * 4096, s, 1, ANY) for s in (4, 16, 32)),
    *(Shape(10**6, 256, 256, s, 20, goal) for s, goal in ((4, 3), (16, 5), (32, 8))),
    *(Shape(10**6, 256, 768, s, 20, goal) for s, goal in ((4, 1.3), (16, 1.8), (32, 2.7))),
    *(
        Shape(n, k, 3 * k, s, 5, ANY)
        for n in (10**5, 10**6)
        for k in (256, 1024, 4096)
        for s in (4, 16, 32)
        if not (n == 10**6 and k == 256)
    ),
]


class Problem:
    """A chunk with traffic: codes as hashed, a helper a third as large as main."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        g = torch.Generator().manual_seed(0)
        config = CCEEmbeddingBagConfig(
            name="t",
            num_embeddings=shape.num_ids,
            embedding_dim=shape.dim,
            feature_names=["f"],
            num_chunks=1,
            num_rows=shape.k,
            num_helper_rows=shape.k_helper,
        )
        weight = torch.randn(shape.k + shape.k_helper, shape.dim, generator=g)
        weight[shape.k :] *= 0.3
        codes = ChunkCodes(Table(config), [0], CPU)
        self.state = ChunkState(codes, 0, weight, {})
        chunk = ChunkShape(
            num_ids=shape.num_ids, num_rows=shape.k, helper_rows=shape.k_helper, dim=shape.dim
        )
        self.plan = budget(chunk, LIMIT)
        pairs = find_pairs(self.state, self.plan).points
        self.start = pairs.vectors(pairs.starts(shape.k))
        if shape.assign_only:
            self.start = kmeans(pairs, shape.k, 2).centroids
        self.original = self.state.ids.codes.clone()

    def reset(self) -> None:
        """The codes as they were."""
        self.state.ids.codes.copy_(self.original)

    def vectors(self) -> torch.Tensor:
        """[N, s] float32: what a peer clusters."""
        ids, k = self.state.ids, self.shape.k
        out = torch.empty(self.shape.num_ids, self.shape.dim)
        for first, last in ids.blocks():
            keys = ids.keys(ids.range(first, last))
            rows = self.state.weight[k + keys % ids.helper_rows]
            out[first:last] = self.state.weight[keys // ids.helper_rows] + rows
        return out

    def ours(self) -> torch.Tensor:
        """Rewrites the codes; returns the centroids."""
        pairs, ids = find_pairs(self.state, self.plan), self.state.ids
        score_bytes = self.plan.score_bytes
        if self.shape.assign_only:
            began = time.process_time()
            nearest = assign(pairs.points, self.start, score_bytes=score_bytes)
            for part in of_all_ids(ids, pairs, nearest):
                part.write()
            self.seconds = time.process_time() - began
            return self.start
        result = kmeans(
            pairs.points,
            self.shape.k,
            self.shape.iterations,
            init=self.start,
            score_bytes=score_bytes,
        )
        if self.plan.samples_per_centroid is None:
            for part in of_all_ids(ids, pairs, result.assignment):
                part.write()
            return result.centroids
        for first in range(0, self.shape.num_ids, ASSIGN_BLOCK):
            block = PairBatch.from_block(ids, pairs.points, first)
            block.new_codes(assign(block.points, result.scored, score_bytes=score_bytes)).write()
        return result.centroids

    def objective(self, x: torch.Tensor, centroids: torch.Tensor) -> float:
        """Sum of squared distances to the nearest centroid, over all ids (k = 4096 and N = 1e7:
        every tenth)."""
        if len(x) * len(centroids) > 2 * 10**10:
            x = x[::10].contiguous()
        total = 0.0
        for start in range(0, len(x), 1 << 20):
            distances, _ = faiss.knn(x[start : start + (1 << 20)].numpy(), centroids.numpy(), 1)
            total += float(distances.astype("float64").clip(min=0).sum())
        return total


def by_faiss(x: torch.Tensor, shape: Shape, start: torch.Tensor) -> torch.Tensor:
    """FAISS's K-means over all vectors, and the final assignment."""
    if shape.assign_only:
        faiss.knn(x.numpy(), start.numpy(), 1)
        return start
    run = faiss.Kmeans(
        shape.dim,
        shape.k,
        niter=shape.iterations,
        max_points_per_centroid=len(x),
        min_points_per_centroid=1,
        seed=0,
    )
    run.train(x.numpy(), init_centroids=start.numpy())
    run.index.search(x.numpy(), 1)
    return torch.from_numpy(run.centroids)


def by_minibatch(x: torch.Tensor, shape: Shape, start: torch.Tensor) -> torch.Tensor:
    """scikit-learn's mini-batch K-means with its own batch size, one pass an iteration."""
    from sklearn.cluster import MiniBatchKMeans

    run = MiniBatchKMeans(
        shape.k, init=start.numpy(), n_init=1, max_iter=shape.iterations, random_state=0
    )
    run.fit(x.numpy())
    run.predict(x.numpy())
    return torch.from_numpy(run.cluster_centers_)


def by_sklearn(x: torch.Tensor, shape: Shape, start: torch.Tensor) -> torch.Tensor:
    """scikit-learn's Lloyd iterations, with its final assignment."""
    from sklearn.cluster import KMeans

    run = KMeans(shape.k, init=start.numpy(), n_init=1, max_iter=shape.iterations, tol=0)
    run.fit(x.numpy())
    return torch.from_numpy(run.cluster_centers_).float()


def peers(shape: Shape) -> dict[str, Callable[[torch.Tensor, Shape, torch.Tensor], torch.Tensor]]:
    """Those that finish in seconds: scikit-learn is left out where it would take minutes."""
    chosen = {"faiss": by_faiss}
    if shape.num_ids <= 10**5:
        chosen["sklearn"] = by_sklearn
        if shape.k <= 1024:
            chosen["sklearn-minibatch"] = by_minibatch
    return chosen
