"""K-means of one chunk, by its owner alone or with its scoring shared among ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

from cce_torchrec.clustering.chunk import (
    Budget,
    ChunkState,
    ChunkUpdate,
    Sampled,
    find_pairs,
    finish,
)
from cce_torchrec.codes import seen_ids
from cce_torchrec.kmeans.backends import SKLEARN_BACKENDS, Backend, make_backend
from cce_torchrec.kmeans.lloyd import KMeansResult, kmeans
from cce_torchrec.kmeans.points import PairPoints, metric_root

SHARE_FROM = 1 << 27
"""Scores per iteration from which ranks share a chunk: below, the network costs more."""
INITS = ("random", "k-means++", "main")


@dataclass(frozen=True)
class Options:
    """How K-means runs; see the arguments of `cluster`."""

    iterations: int = 6
    backend: str = "auto"
    init: str = "random"
    tolerance: float = 0.0
    samples_per_centroid: int | None = None
    memory_limit: int | None = None
    weights: Mapping[str, torch.Tensor] | str | None = None
    metric: Mapping[str, torch.Tensor] | None = None
    finalise: bool = False

    def check(self) -> None:
        """Raises ValueError if an option cannot be used."""
        if self.init not in INITS:
            raise ValueError(f"unknown init {self.init!r}; choose one of {list(INITS)}")
        if self.finalise and self.init == "main":
            raise ValueError(
                "init 'main' has no start for the helper's rows that finalize gives to main; use "
                "'random' or 'k-means++'"
            )
        if self.iterations < 1:
            raise ValueError(f"iterations {self.iterations} must be at least 1")
        if isinstance(self.weights, str) and self.weights != "seen":
            raise ValueError(f"unknown weights {self.weights!r}; give 'seen' or a mapping")
        if self.samples_per_centroid is not None and self.samples_per_centroid < 1:
            raise ValueError(f"samples_per_centroid {self.samples_per_centroid} is below 1")

    def make_backend(self, device: torch.device) -> Backend:
        """The backend that assigns ids: scikit-learn's leave that to ours."""
        name = "auto" if self.backend in SKLEARN_BACKENDS else self.backend
        return make_backend(name, device)

    def weights_of(self, state: ChunkState) -> torch.Tensor | None:
        """int64 weights [N] of a table's ids, or None for one each.

        Raises:
            ValueError: weights that are not N integers, at least 0; "seen" without `track_seen`.
        """
        config = state.codes.config
        if isinstance(self.weights, str):
            if state.codes.seen is None:
                raise ValueError(f"{state.who}: weights='seen' needs a table with track_seen=True")
            return seen_ids(state.codes.seen, config.num_embeddings).long()
        if self.weights is None or config.name not in self.weights:
            return None
        weights = self.weights[config.name]
        if weights.shape != (config.num_embeddings,) or weights.is_floating_point():
            raise ValueError(
                f"table {config.name!r}: weights must be integers [{config.num_embeddings}], one "
                f"per id; got {weights.dtype} {tuple(weights.shape)}"
            )
        if int(weights.min()) < 0:
            raise ValueError(f"table {config.name!r}: a weight of {int(weights.min())} is negative")
        return weights.to(state.weight.device, torch.int64).contiguous()

    def metric_of(self, name: str, chunk: int, dim: int) -> torch.Tensor | None:
        """The metric [s, s] of a chunk of table `name`, or None for the Euclidean one."""
        if self.metric is None or name not in self.metric:
            return None
        metric = self.metric[name]
        if metric.dim() != 3 or metric.shape[1:] != (dim, dim) or not 0 <= chunk < len(metric):
            raise ValueError(
                f"table {name!r}: metric must be [num_chunks, {dim}, {dim}]; got "
                f"{tuple(metric.shape)}"
            )
        return metric[chunk]

    def check_for(self, state: ChunkState) -> None:
        """Raises ValueError if an option does not suit a chunk, or its weights are not finite."""
        state.check()
        config = state.codes.config
        if self.weights is not None and state.column == 0:
            self.weights_of(state)
        metric = self.metric_of(config.name, state.chunk, config.chunk_dim)
        if metric is not None:
            metric_root(metric, config.chunk_dim)


@dataclass(frozen=True)
class Task:
    """A chunk to be clustered, as every rank hears of it."""

    path: str
    table: str
    chunk: int
    num_rows: int
    num_helper_rows: int
    dim: int
    num_clusters: int
    scores: int
    """Per K-means iteration, at most."""
    budget: Budget

    @property
    def key(self) -> tuple[str, int]:
        """Identifies the chunk in the model."""
        return self.path, self.chunk

    @property
    def shared(self) -> bool:
        """Whether ranks share its scoring, if they do not all own it."""
        return self.budget.by_pair and self.scores >= SHARE_FROM


def alone(state: ChunkState, task: Task, options: Options) -> ChunkUpdate:
    """What the step will write to a chunk of this rank; no collective."""
    weights = options.weights_of(state)
    sampled = find_pairs(state, task.budget, weights)
    result = _kmeans(sampled.points, task, options, None)
    metric = options.metric_of(task.table, task.chunk, task.dim)
    return finish(state, sampled, result, options.make_backend(state.weight.device), metric)


def together(
    state: ChunkState | None,
    task: Task,
    owner: int,
    options: Options,
    device: torch.device,
    group: dist.ProcessGroup,
) -> ChunkUpdate | None:
    """The same, collectively: `owner` sends pairs and counts, all ranks score, it finishes.

    Raises:
        ValueError: on every rank, if the owner cannot list the pairs.
    """
    sampled: Sampled | None = None
    failure: Exception | None = None
    if state is not None:
        try:
            sampled = find_pairs(state, task.budget, options.weights_of(state))
        except Exception as error:  # the others wait for this rank's message
            failure = error
    points = _broadcast(sampled.points if sampled else None, task, owner, device, group)
    if points is None:
        raise ValueError(
            f"table {task.table!r}, chunk {task.chunk}: rank {owner} of the group could not list "
            f"its pairs{f': {failure}' if failure else ''}; nothing was clustered"
        ) from failure
    result = _kmeans(points, task, options, group)
    if state is None or sampled is None:
        return None
    metric = options.metric_of(task.table, task.chunk, task.dim)
    return finish(state, sampled, result, options.make_backend(device), metric)


def _kmeans(
    points: PairPoints, task: Task, options: Options, group: dist.ProcessGroup | None
) -> KMeansResult:
    init = points.codebooks()[0] if options.init == "main" else options.init
    return kmeans(
        points,
        task.num_clusters,
        options.iterations,
        backend=options.backend,
        init=init,
        tolerance=options.tolerance,
        metric=options.metric_of(task.table, task.chunk, task.dim),
        process_group=group,
    )


def _broadcast(
    points: PairPoints | None,
    task: Task,
    owner: int,
    device: torch.device,
    group: dist.ProcessGroup,
) -> PairPoints | None:
    """The owner's points on every rank, bit for bit: codebooks, pairs and counts, no codes.

    None on every rank where the owner has none.
    """
    source = dist.get_global_rank(group, owner)
    header = torch.zeros(2, dtype=torch.int64, device=device)
    if points is not None:
        header = torch.tensor([points.num_points, len(points.starts(1 << 40))], device=device)
    dist.broadcast(header, source, group=group)
    num_points, num_starts = header.tolist()
    if num_points == 0:
        return None
    rows = task.num_rows + task.num_helper_rows
    sizes = [rows * task.dim, num_points, num_points]
    ints = torch.empty(sum(sizes), dtype=torch.int32, device=device)
    longs = torch.empty(num_points + num_starts, dtype=torch.int64, device=device)
    scale = torch.zeros(1, dtype=torch.float64, device=device)
    if points is not None:
        books = torch.cat([points.main, points.helper]).view(-1)
        ints = torch.cat([books, points.a, points.b])
        longs = torch.cat([points.weights, points.starts(1 << 40)])
        scale.fill_(points.scale)
    for tensor in (ints, longs, scale):
        dist.broadcast(tensor, source, group=group)
    if points is not None:
        return points
    books, a, b = ints.split(sizes)
    weights, starts = longs.split([num_points, num_starts])
    main, helper = books.view(rows, task.dim).split([task.num_rows, task.num_helper_rows])
    return PairPoints.from_integers(main, helper, float(scale), a, b, weights, starts)
