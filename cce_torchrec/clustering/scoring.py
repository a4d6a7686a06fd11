"""K-means over the points of one chunk, and the nearest of its centroids, as the caller chose."""

from __future__ import annotations

import torch

from cce_torchrec.clustering.chunk_group import ChunkGroup
from cce_torchrec.clustering.options import Options
from cce_torchrec.clustering.task import Task
from cce_torchrec.codes.counts import shrinkage
from cce_torchrec.kmeans.ieee import ieee_float32
from cce_torchrec.kmeans.lloyd import KMeansResult, kmeans
from cce_torchrec.kmeans.points import PairPoints, metric_root
from cce_torchrec.kmeans.scan import assign
from cce_torchrec.spans import span


class Scoring:
    """What all ways to cluster a chunk have in common."""

    def __init__(self, task: Task, options: Options, device: torch.device) -> None:
        self._task, self._options, self._device = task, options, device
        self._metric = options.metric_of(task.table, task.chunk, task.shape.dim)
        self._transformed: tuple[torch.Tensor, PairPoints] | None = None

    def kmeans(self, points: PairPoints, scorers: ChunkGroup) -> KMeansResult:
        """Clusters `points`; every rank of `scorers` calls it."""
        task, options = self._task, self._options
        with span(f"{task.span}, k-means"):
            return kmeans(
                points,
                task.num_clusters,
                options.iterations,
                backend=options.backend,
                init=self._main(points) if options.init == "main" else options.init,
                tolerance=options.tolerance,
                metric=self._metric,
                process_group=scorers.group,
                score_bytes=task.budget.score_bytes,
            )

    def _main(self, points: PairPoints) -> torch.Tensor:
        """Main as it is, [k, s]."""
        main, levels = points.codebooks()[0], self._task.shape.levels
        return main if levels == 1 else main[levels - 1 :: levels] / float(shrinkage()[-1])

    def _in_metric_space(self, points: PairPoints) -> PairPoints:
        """`points` in the space of the metric."""
        if self._metric is None:
            return points
        # Codebooks are transformed once for all blocks of ids, which differ in their pairs alone.
        if self._transformed is None or self._transformed[0] is not points.main:
            root = metric_root(self._metric, self._task.shape.dim).to(self._device)
            with ieee_float32(self._device):
                self._transformed = (points.main, points.transformed(root))
        books = self._transformed[1]  # those of every block of ids
        rest = (points.a, points.b, points.weights, points.starts(points.num_points))
        return PairPoints.from_integers(books.main, books.helper, books.scale, *rest)

    def nearest(
        self, points: PairPoints, scored: torch.Tensor, scorers: ChunkGroup
    ) -> torch.Tensor:
        """Nearest of the centroids `scored` last, int32 [n]; every rank of `scorers` calls it."""
        transformed = scorers.together(lambda: self._in_metric_space(points))
        return assign(
            transformed,
            scored,
            backend=self._options.scorer,
            process_group=scorers.group,
            score_bytes=self._task.budget.score_bytes,
        )
