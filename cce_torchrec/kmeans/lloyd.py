"""Lloyd's iterations over weighted pairs, deterministic from start to end."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cce_torchrec.kmeans.pairs import BLOCK, PairPoints

_SPLIT = 1 / 1024


@dataclass(frozen=True)
class KMeansResult:
    """Outcome of `kmeans`.

    Shapes: `centroids` float32 [k, s]; `assignment` int64 [P], per distinct pair.
    """

    centroids: torch.Tensor
    assignment: torch.Tensor
    objective: list[float]
    """Sum over ids of the squared distance to the nearest centroid, per assignment made."""
    empty_clusters: int
    """Clusters that no id is assigned to at the end."""


def assign(points: PairPoints, centroids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Nearest centroid of every pair, int64 [P], and its squared distance, float64 [P].

    Ties go to the lowest index.
    """
    half_norms = -0.5 * (centroids * centroids).sum(1)
    nearest, distances = [], []
    for start in range(0, points.num_pairs, BLOCK):
        x = points.vectors(start, start + BLOCK)
        index = torch.addmm(half_norms, x, centroids.t()).argmax(1)
        nearest.append(index)
        distances.append((x.double() - centroids[index].double()).square().sum(1))
    return torch.cat(nearest), torch.cat(distances)


def update(
    points: PairPoints, assignment: torch.Tensor, centroids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Means of the assigned ids, float32 [k, s], and their numbers, int64 [k].

    Sums are exact integers. A cluster without ids keeps its centroid.
    """
    num = centroids.shape[0]
    sums = torch.zeros(centroids.shape, dtype=torch.int64, device=centroids.device)
    for start in range(0, points.num_pairs, BLOCK):
        block = slice(start, start + BLOCK)
        weighted = points.integers(start, start + BLOCK) * points.counts[block, None]
        sums.index_add_(0, assignment[block], weighted)
    sizes = torch.zeros(num, dtype=torch.int64, device=centroids.device)
    sizes.index_add_(0, assignment, points.counts)
    means = (sums.double() / sizes.clamp(min=1)[:, None] / points.scale).float()
    return torch.where(sizes[:, None] > 0, means, centroids), sizes


def refill_empty(centroids: torch.Tensor, sizes: torch.Tensor, error: torch.Tensor) -> torch.Tensor:
    """The i-th empty cluster takes a copy of the centroid with the i-th largest error.

    The two copies are perturbed by 1 +- 1/1024 with alternating sign, as FAISS does. Clusters
    without error are not split: their points lie on the centroid.
    """
    empty = (sizes == 0).nonzero().view(-1)
    order = torch.sort(error, descending=True, stable=True).indices
    donors = order[error[order] > 0][: empty.numel()]
    empty = empty[: donors.numel()]
    signs = torch.ones(centroids.shape[1], device=centroids.device)
    signs[1::2] = -1
    out = centroids.clone()
    out[empty] = centroids[donors] * (1 + signs * _SPLIT)
    out[donors] = centroids[donors] * (1 - signs * _SPLIT)
    return out


def kmeans(points: PairPoints, num_clusters: int, iterations: int = 6) -> KMeansResult:
    """Weighted K-means with `num_clusters` clusters from a cold start.

    Every id counts once. With fewer distinct pairs than clusters every pair is its own centroid
    and the clusters left over stay empty, at zero.

    Raises:
        ValueError: `num_clusters` or `iterations` below 1, or no points.
    """
    if num_clusters < 1 or iterations < 1 or points.num_pairs < 1:
        raise ValueError(
            f"K-means needs points, clusters and iterations: {points.num_pairs} points, "
            f"num_clusters {num_clusters}, iterations {iterations}"
        )
    start = torch.sort(points.first).indices[:num_clusters]
    x = (points.main[points.main_rows[start]] + points.helper[points.helper_rows[start]]).double()
    centroids = torch.zeros(
        num_clusters, x.shape[1], dtype=torch.float32, device=points.counts.device
    )
    centroids[: len(start)] = (x / points.scale).float()
    objective: list[float] = []
    for iteration in range(iterations):
        assignment, distances = assign(points, centroids)
        weighted = distances * points.counts
        objective.append(float(weighted.sum()))
        centroids, sizes = update(points, assignment, centroids)
        if iteration + 1 < iterations and bool((sizes == 0).any()):
            error = torch.zeros(num_clusters, dtype=torch.float64, device=centroids.device)
            error.index_add_(0, assignment, weighted)
            centroids = refill_empty(centroids, sizes, error)
    assignment, distances = assign(points, centroids)
    objective.append(float((distances * points.counts).sum()))
    empty = num_clusters - int(torch.unique(assignment).numel())
    return KMeansResult(centroids, assignment, objective, empty)
