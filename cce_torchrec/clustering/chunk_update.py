"""What a clustering step makes of one chunk: new codebook, optimizer state and helper rows."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from cce_torchrec.clustering.budget import ChunkShape
from cce_torchrec.clustering.exact_sums import weighted_sums
from cce_torchrec.clustering.id_passes import NewCodes
from cce_torchrec.clustering.moves import Moves
from cce_torchrec.clustering.task import Task
from cce_torchrec.kmeans.lloyd import KMeansResult
from cce_torchrec.kmeans.points import PairPoints
from cce_torchrec.optimizer_state import reset_of


@dataclass
class ChunkUpdate:
    """What a clustering step will write of one chunk."""

    weight: torch.Tensor
    """float32 [k + k', s]."""
    optimizer_state: dict[str, torch.Tensor]
    objective_before: float
    objective_after: float
    empty_clusters: int
    scored: torch.Tensor
    """[k, s]: what the nearest of is an id's new code, in the space of the metric."""
    codes: list[NewCodes] = field(default_factory=list)
    """Of this rank's ids; empty where they are found again when they are written."""
    changed: int = 0
    """Ids whose code is another one."""
    moved: float = 0.0
    """Share of ids that changed their cluster, whatever clusters are called."""
    dead_rows: int = 0
    """Main and helper rows that no id will read."""
    imbalance: float = 0.0
    """Of the clusters, in numbers of ids."""


def new_main_rows(
    task: Task,
    optimizer_state: dict[str, torch.Tensor],
    points: PairPoints,
    result: KMeansResult,
) -> ChunkUpdate:
    """New main rows and optimizer state, from the K-means `result` over the chunk's pairs.

    The same on every rank; `optimizer_state` is the owner's, and empty elsewhere.
    """
    # Helper rows stay zero until the new codes are known, of which they are the residuals.
    weight = torch.zeros(task.codebook_shape, dtype=torch.float32, device=points.main.device)
    weight[: task.num_clusters] = result.centroids
    return ChunkUpdate(
        weight=weight,
        optimizer_state={
            key: _new_optimizer_state(key, value, points, result, task.shape)
            for key, value in optimizer_state.items()
        },
        objective_before=_objective_before(points, task.shape),
        objective_after=result.objective[-1],
        empty_clusters=result.empty_clusters,
        scored=result.scored,
    )


_ROW_BLOCK = 1 << 18
"""Rows whose squares are added up at once."""


class Relabelling:
    """Takes the new codes of a chunk, part by part, before they are written.

    Without a helper after the step only changed codes are counted.
    """

    def __init__(self, task: Task, points: PairPoints, update: ChunkUpdate) -> None:
        self._task, self._points, self._update = task, points, update
        shape = task.shape
        self.moves = Moves(
            shape.num_rows,
            task.num_clusters,
            num_ids=shape.num_ids,
            levels=shape.levels,
            device=points.main.device,
        )
        self._hash = task.new_helper_hash
        # In fixed point, as the points are: sums of residuals are the same in any order then.
        main = update.weight[: task.num_clusters]
        self._centroids = (main.double() * points.scale).round().int()
        rows, dim = task.shape.helper_rows, task.shape.dim
        # Helper rows of the table: points may have them once a level.
        size, device = rows * dim, points.helper.device
        self.totals = torch.zeros(size + rows + 1, dtype=torch.int64, device=device)
        """Sums of residuals, their numbers and changed codes so far; ranks may add them up."""
        sums, self._sizes, self._changed = self.totals.split([size, rows, 1])
        self._sums = sums.view(rows, dim)

    def take(self, part: NewCodes, counted: bool) -> None:
        """Adds the residuals of the ids of `part`, and counts those whose code changes.

        Args:
            part: new codes.
            counted: whether `moves` knows of its ids by their pairs.
        """
        if not counted:
            self.moves.add_codes(part)
        if not self._task.finalize:
            stats = (self._sums, self._sizes)
            part.add_residuals(self._points, self._centroids, self._hash, stats)
        self._changed += part.changed()

    def finish(self) -> None:
        """Helper rows become mean residuals under the new hash, or zero where there are none."""
        update, moves = self._update, self.moves
        update.changed, update.dead_rows = int(self._changed), moves.empty
        update.moved, update.imbalance = moves.moved(), moves.imbalance
        if self._task.finalize:
            return
        update.dead_rows += int((self._sizes == 0).sum())
        means = self._sums.double() / self._sizes.clamp(min=1)[:, None] / self._points.scale
        self._update.weight[len(self._centroids) :] = means.float()


def _objective_before(points: PairPoints, shape: ChunkShape) -> float:
    """Squared distances of points from their old main rows; of shrunk ones, from the shrunk row."""
    # What is not main in a point is its helper row. Counts are exact in any order: integers, and
    # all weights sum to 2^33 at most (MAX_WEIGHT), far below 2^53.
    blocks = points.helper.split(_ROW_BLOCK)  # in double precision they are twice as large
    norms = torch.cat([(rows.double() / points.scale).square().sum(1) for rows in blocks])
    counts = torch.zeros_like(norms, dtype=torch.int64).index_add_(0, points.b, points.weights)
    return float((norms * counts.double()).sum())


def _new_optimizer_state(
    name: str, old: torch.Tensor, points: PairPoints, result: KMeansResult, shape: ChunkShape
) -> torch.Tensor:
    """Main: mean over the ids of the cluster, or zero. Helper: a share of the old one's mean."""
    new, reset = torch.zeros_like(old), reset_of(name)
    if not reset.main_is_mean:
        return new
    old_rows, new_rows = shape.num_rows, len(result.centroids)
    main = old[:old_rows].double().reshape(old_rows, -1)
    sums = weighted_sums(
        main,
        rows=points.a if shape.levels == 1 else points.a // shape.levels,
        weights=points.weights,
        clusters=result.assignment,
        num_clusters=new_rows,
    )
    sizes = result.sizes[:, None]
    # A cluster without ids has no mean of its own: its row starts from what rows have on average.
    means = torch.where(sizes > 0, sums / sizes.clamp(min=1), main.mean(0))
    new[:new_rows] = means.reshape(new[:new_rows].shape).to(old.dtype)
    if new_rows < len(new):
        helper_mean = old[old_rows:].double().mean(0)
        new[new_rows:] = (reset.helper_share * helper_mean).to(old.dtype)
    return new
