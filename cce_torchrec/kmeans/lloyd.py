"""Lloyd's iterations over weighted points, deterministic from start to end."""

from __future__ import annotations

import functools
import time
from collections.abc import Hashable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from cce_torchrec.collectives import same_task, together
from cce_torchrec.kmeans.backends import (
    SCORE_BYTES,
    SKLEARN_BACKENDS,
    Backend,
    make_backend,
    optional_module,
)
from cce_torchrec.kmeans.ieee import ieee_float32
from cce_torchrec.kmeans.plus_plus import plus_plus
from cce_torchrec.kmeans.points import MAX_MAGNITUDE, Points, TensorPoints, metric_root
from cce_torchrec.kmeans.scan import Share

_SPLIT = 1 / 1024
_PLUS_PLUS_SAMPLE = 32
INITS = ("random", "k-means++")


@dataclass(frozen=True, kw_only=True)
class IterationStats:
    """One assignment of all points and what followed."""

    objective: float
    """Sum over points of weight times squared distance to the nearest centroid."""
    seconds: float
    imbalance: float
    """k * sum(n_c^2) / (sum n_c)^2: 1 when all clusters are equally large (FAISS's factor)."""
    splits: int
    """Empty clusters that took half of another one after this assignment."""


@dataclass(frozen=True, kw_only=True)
class KMeansResult:
    """Outcome of `kmeans`.

    Shapes: `centroids` float32 [k, s]; `assignment` int32 [n], per point; `sizes` int64 [k],
    summed weights.
    """

    centroids: torch.Tensor
    assignment: torch.Tensor
    sizes: torch.Tensor
    scored: torch.Tensor
    """float32 [k, s]: what `assignment` is nearest to, in the space of the metric; without one,
    the centroids."""
    iterations: list[IterationStats]
    """One per assignment: of every Lloyd iteration, and of the final centroids."""

    @property
    def objective(self) -> list[float]:
        """The objective of every assignment made; the last is that of the result."""
        return [iteration.objective for iteration in self.iterations]

    @property
    def empty_clusters(self) -> int:
        """Clusters without points at the end."""
        return int((self.sizes == 0).sum())


def kmeans(
    points: Points | torch.Tensor,
    num_clusters: int,
    iterations: int = 6,
    *,
    weights: torch.Tensor | None = None,
    backend: str = "auto",
    init: str | torch.Tensor = "random",
    tolerance: float = 0.0,
    metric: torch.Tensor | None = None,
    process_group: dist.ProcessGroup | None = None,
    score_bytes: int = SCORE_BYTES,
) -> KMeansResult:
    """Weighted K-means with `num_clusters` clusters.

    Single process, or collective: every rank of `process_group` calls it with the same points,
    scores its share of them in fixed blocks, and gets the same bytes, whatever their number.
    With fewer different points than clusters every point is its own centroid and the clusters
    left over stay empty.

    Args:
        points: a matrix [n, s], or any `Points`.
        iterations: at most so many Lloyd iterations; they end early when no sum changes.
        weights: int64 [n], with a matrix only.
        backend: auto, native (compiled, CPU), torch, triton (CUDA), faiss, sklearn or
            sklearn-minibatch. The last two fit centroids by scikit-learn (the first rank's count);
            auto scores the final assignment.
        init: "random" (points drawn by hash), "k-means++" (Arthur and Vassilvitskii 2007, over a
            sample of 32 points per cluster), or starting centroids [k, s].
        metric: [s, s], positive semi-definite: distances are (x - y)^T metric (x - y), the
            objective too; centroids are means all the same.
        tolerance: also end when an iteration lowers the objective by less than this share.
        score_bytes: most that tables of scores may take (native, over pairs).

    Raises:
        ValueError: no points, `num_clusters` or `iterations` below 1, values that are not
            finite, starting centroids of another shape, ranks that disagree about shapes,
            weights that sum to more than 2^33.
    """

    def prepared() -> tuple[tuple[_Problem, Backend, Share], Hashable]:
        problem = _Problem(points, weights, num_clusters, iterations, metric, init)
        name = "auto" if backend in SKLEARN_BACKENDS else backend  # what scores at the end
        engine = make_backend(name, problem.points.device, score_bytes)
        share = Share(problem.points, num_clusters, process_group)
        return (problem, engine, share), (problem.shape, iterations, backend, tolerance)

    what = "(points, dim, clusters), iterations, backend, tolerance"
    problem, engine, share = same_task(prepared, what, process_group)
    centroids, most = problem.start, iterations
    on_all = functools.partial(together, device=problem.points.device, group=process_group)
    if backend in SKLEARN_BACKENDS:
        fitted = on_all(_sklearn_fit, problem.points, centroids, iterations, backend)
        centroids, most = share.from_first_rank(fitted), 0
    result = _lloyd(problem.points, centroids, most, tolerance, engine, share)
    if metric is not None:
        result = replace(result, centroids=on_all(_means, problem.original, result))
    return result


class _Problem:
    """Checked arguments of `kmeans`: the points in the space of the metric, and the start."""

    def __init__(
        self,
        points: Points | torch.Tensor,
        weights: torch.Tensor | None,
        k: int,
        iterations: int,
        metric: torch.Tensor | None,
        init: str | torch.Tensor,
    ) -> None:
        if not isinstance(points, Points):
            points = TensorPoints(points, weights)
        elif weights is not None:
            raise ValueError("weights belong to a matrix of points; these points have their own")
        if k < 1 or iterations < 1 or points.num_points < 1:
            raise ValueError(
                f"K-means needs points, clusters and iterations: {points.num_points} points, "
                f"num_clusters {k}, iterations {iterations}"
            )
        points.check_weights()
        self.original = self.points = points
        if metric is not None:
            root = metric_root(metric, points.dim).to(points.device)
            with ieee_float32(points.device):
                self.points = points.transformed(root)
                if isinstance(init, torch.Tensor):
                    init = init.float().to(points.device) @ root
        self.start = _start(self.points, k, init)
        self.shape = (points.num_points, points.dim, k)


def _lloyd(
    points: Points,
    centroids: torch.Tensor,
    iterations: int,
    tolerance: float,
    engine: Backend,
    share: Share,
) -> KMeansResult:
    """At most `iterations` assignments and updates, and an assignment to the last centroids."""
    stats: list[IterationStats] = []
    total = float(points.weights.sum())
    assigned: torch.Tensor | None = None
    while True:
        del assigned  # before the next one is made
        began = time.perf_counter()
        sums, sizes, errors, assigned = share.scan(points, centroids, engine)
        updated, splits, counts = centroids, 0, sizes.double()
        if len(stats) < iterations:
            updated = (sums.double() / (counts * points.scale)[:, None]).float()
            updated = torch.where(sizes[:, None] > 0, updated, centroids)  # no mean of no points
        # All that the host reads of an iteration, at once: each read waits for the device.
        numbers = (
            errors.sum(),
            counts.dot(counts),
            (sizes == 0).sum(),
            (updated != centroids).any(),
        )
        error, squares, empty, moved = torch.stack([n.double() for n in numbers]).tolist()
        if empty and len(stats) < iterations:
            # Left alone, empty clusters cost 7 % to 26 % of the objective. A squared distance is
            # rounded to whole units, which backends may do otherwise.
            updated, splits = refill_empty(updated, sizes, errors, rounding=sizes)
            moved = not torch.equal(updated, centroids)  # a split may come out as it was
        objective = error / points.error_scale
        imbalance = len(counts) * squares / total**2 if total else 0.0
        seconds = time.perf_counter() - began
        stats.append(
            IterationStats(objective=objective, seconds=seconds, imbalance=imbalance, splits=splits)
        )
        if not moved:
            return KMeansResult(
                centroids=centroids,
                assignment=share.gather(assigned),
                sizes=sizes,
                scored=centroids,
                iterations=stats,
            )
        centroids = updated
        # Not after a split, which moves its donor off its mean: the objective may rise at first.
        least = tolerance * stats[-2].objective if tolerance and len(stats) > 1 else None
        if least is not None and stats[-2].objective - objective < least and not splits:
            iterations = len(stats)


def _means(points: Points, result: KMeansResult) -> torch.Tensor:
    """Mean of the points of each cluster of `result`; of all points where it has none."""
    k = len(result.sizes)
    sums = torch.zeros(k, points.dim, dtype=torch.int64, device=points.device)
    sizes, errors = torch.zeros_like(result.sizes), torch.zeros_like(result.sizes)
    origin = torch.zeros(k, points.dim, dtype=torch.float32, device=points.device)
    points.accumulate(0, result.assignment, origin, 0.0, (sums, sizes, errors))
    overall = sums.sum(0).double() / sizes.sum()  # at most 2^62, see MAX_WEIGHT
    means = torch.where(sizes[:, None] > 0, sums.double() / sizes.clamp(min=1)[:, None], overall)
    return (means / points.scale).float()


def refill_empty(
    centroids: torch.Tensor, sizes: torch.Tensor, errors: torch.Tensor, rounding: torch.Tensor | int
) -> tuple[torch.Tensor, int]:
    """The i-th empty cluster takes a copy of the centroid with the i-th largest error.

    The two copies are perturbed by 1 +- 1/1024 with alternating sign, as FAISS does. Clusters
    whose error is at most `rounding` are not split: their points lie on the centroid. Returns the
    centroids and the number of splits.
    """
    is_empty, has_error = sizes == 0, errors > rounding
    splits = int(torch.minimum(is_empty.sum(), has_error.sum()))  # the only wait for the device
    empty = torch.sort(is_empty.byte(), descending=True, stable=True).indices[:splits]
    ranked = torch.where(has_error, errors, -1)
    donors = torch.sort(ranked, descending=True, stable=True).indices[:splits]
    signs = centroids.new_ones(centroids.shape[1])
    signs[1::2] = -1
    out = centroids.clone()
    out[empty] = centroids[donors] * (1 + signs * _SPLIT)
    out[donors] = centroids[donors] * (1 - signs * _SPLIT)
    return out, splits


def _start(points: Points, k: int, init: str | torch.Tensor) -> torch.Tensor:
    if isinstance(init, torch.Tensor):
        if init.shape != (k, points.dim) or not bool((init.abs() <= MAX_MAGNITUDE).all()):
            raise ValueError(
                f"starting centroids must be finite, at most {MAX_MAGNITUDE:g} and "
                f"[{k}, {points.dim}]; got {tuple(init.shape)}"
            )
        return init.detach().float().to(points.device)
    if init not in INITS:
        raise ValueError(f"unknown init {init!r}; choose one of {list(INITS)} or give centroids")
    if init == "k-means++":
        return plus_plus(points.vectors(points.starts(_PLUS_PLUS_SAMPLE * k)), k)
    # Not the codebook that there is: started from it, models came out slightly worse.
    first = points.vectors(points.starts(k))
    out = torch.zeros(k, points.dim, dtype=torch.float32, device=points.device)
    out[: len(first)] = first
    return out


def _sklearn_fit(points: Points, start: torch.Tensor, iterations: int, name: str) -> torch.Tensor:
    """Centroids by scikit-learn, from the same start over the same weighted points."""
    cluster = optional_module("sklearn.cluster", "sklearn")
    x = points.vectors(slice(None)).cpu().numpy()
    weights = points.weights.double().cpu().numpy()
    k = len(start)
    if len(x) < k:
        raise ValueError(f"scikit-learn needs at least as many points as clusters: {len(x)} < {k}")
    kind = cluster.KMeans if name == "sklearn" else cluster.MiniBatchKMeans
    model = kind(k, init=start.cpu().numpy(), n_init=1, max_iter=iterations, random_state=0)
    model.fit(x, sample_weight=weights)
    return torch.from_numpy(model.cluster_centers_).float().contiguous().to(points.device)
