"""How the pairs of a chunk are found and what memory that takes, computed before anything is."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cce_torchrec.clustering import gpu_budget
from cce_torchrec.codes.whole_codes import whole_bytes
from cce_torchrec.kmeans import native
from cce_torchrec.kmeans.backends import SCORE_BYTES, SKLEARN_BACKENDS, score_table_bytes
from cce_torchrec.kmeans.gpu_blocks import points_at_once, width
from cce_torchrec.kmeans.points import BLOCK

SAMPLES_PER_CENTROID = 200
"""Ids per cluster that K-means sees where all distinct pairs would not fit: half a percent of the
objective is lost against all ids; with 50 it would be 3.4 percent."""
ASSIGN_BLOCK = 1 << 19
"""Ids that get their codes at once, where K-means did not see them all; on a CPU."""
_SLACK = 1 << 23


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How a chunk is clustered, a function of its shape and the limit alone."""

    by_pair: bool
    """A table over all k * k' pairs; otherwise a list of the pairs of (sampled) ids."""
    samples_per_centroid: int | None
    """None: all ids."""
    score_bytes: int
    """Most that tables of scores may take."""
    working_bytes: int
    """Peak beside the model while the chunk is clustered, on every rank that takes part."""
    code_bytes: int
    """New codes, which wait until all chunks commit or are found again when they do."""


def assign_block(device: torch.device, dim: int) -> int:
    """Ids that get their codes at once on `device`, where K-means did not see them all."""
    if device.type != "cuda":
        return ASSIGN_BLOCK
    return points_at_once(dim)


def sample_room(ids: int, share: float) -> int:
    """Room for a sample of a `share` of `ids`, drawn by hash: about as many."""
    # A tenth and 1,024 more than expected: so many standard deviations that it hardly overflows.
    return min(ids, round(1.1 * share * ids) + 1024)


@dataclass(frozen=True, kw_only=True)
class Engine:
    """What K-means runs on, as far as memory depends on it."""

    backend: str = "auto"
    init: str = "random"
    weighted: bool = False
    metric: bool = False
    device: str = "cpu"

    triton: bool = False
    """Whether the Triton kernels run where K-means does."""

    @property
    def on_gpu(self) -> bool:
        """Whether all passes and the scoring run in Triton."""
        return self.triton and self.backend in ("auto", "triton", *SKLEARN_BACKENDS)

    @property
    def compiled(self) -> bool:
        """Whether points are scored and added up without temporaries."""
        ours = self.backend in ("auto", "native", *SKLEARN_BACKENDS)
        return ours and self.device == "cpu" and native.available()


@dataclass(frozen=True, kw_only=True)
class ChunkShape:
    """What the memory and the work of a chunk's clustering depend on."""

    num_ids: int
    num_rows: int
    helper_rows: int
    dim: int
    levels: int = 1
    """Of counts of ids, by which vectors are shrunk."""

    @property
    def main_points(self) -> int:
        """Rows of main, of each level."""
        return self.num_rows * self.levels

    @property
    def helper_points(self) -> int:
        """Rows of the helper, of each level."""
        return self.helper_rows * self.levels

    @property
    def cells(self) -> int:
        """Pairs of a main and a helper row (of each level), those that no id has too."""
        return self.main_points * self.helper_rows


def budget(
    shape: ChunkShape,
    memory_limit: int,
    *,
    samples_per_centroid: int | None = None,
    engine: Engine = Engine(),
    finalize: bool = False,
) -> Budget:
    """How a chunk of `shape` is clustered within three quarters of `memory_limit` bytes.

    The last quarter is for new codebooks that wait for other chunks. Where not even a sample
    fits, the budget says how much it takes.
    """
    num_ids, cells = shape.num_ids, shape.cells
    clusters = shape.num_rows + shape.helper_rows * finalize
    code = whole_bytes(clusters)
    score_bytes = _score_bytes(shape, clusters, memory_limit, engine)
    fixed = score_bytes + _book_bytes(clusters, shape, engine, bool(score_bytes))
    room = 3 * memory_limit // 4

    by_pair = _table_bytes(shape, code, engine) + fixed
    # A table of all pairs is swept as a whole; beyond this, a list of those that occur is shorter.
    cells_per_id = gpu_budget.CELLS_PER_ID if engine.on_gpu else 2
    pairs_repeat = cells <= max(cells_per_id * num_ids, 1 << 20)
    if samples_per_centroid is None and pairs_repeat and by_pair <= room:
        return Budget(
            by_pair=True,
            samples_per_centroid=None,
            score_bytes=score_bytes,
            working_bytes=by_pair,
            code_bytes=code * cells,
        )

    column = code * num_ids
    working = _list_bytes(num_ids, shape.dim, engine) + fixed + column
    # A sample is drawn only where the list of all ids would not fit, or as the caller says; one
    # that would be as large as the table is the table.
    samples = samples_per_centroid or SAMPLES_PER_CENTROID
    every = (samples_per_centroid is None and working <= room) or samples * clusters >= num_ids
    if not every:
        sampled = sample_room(num_ids, samples * clusters / num_ids)
        working = _sample_bytes(shape, sampled, engine) + fixed
    return Budget(
        by_pair=False,
        samples_per_centroid=None if every else samples,
        score_bytes=score_bytes,
        working_bytes=working,
        code_bytes=column,
    )


def _score_bytes(shape: ChunkShape, clusters: int, memory_limit: int, engine: Engine) -> int:
    """Of tables of scores, which are the compiled kernels' alone; 0 where they would not fit."""
    scores = score_table_bytes(shape.main_points, shape.helper_points, clusters)
    fits = scores <= min(SCORE_BYTES, memory_limit // 4)
    return scores if fits and engine.device == "cpu" else 0


def _table_bytes(shape: ChunkShape, code: int, engine: Engine) -> int:
    """Where pairs are counted in a table over all k * k' of them."""
    # Ids of equal code and hash are one point of K-means, weighted: the work stops growing with N.
    pairs = min(shape.num_ids, shape.cells)
    if engine.on_gpu:
        return _sklearn_bytes(pairs, shape.dim, engine) + gpu_budget.by_cells(
            num_ids=shape.num_ids,
            cells=shape.cells,
            dim=shape.dim,
            code=code,
            weighted=engine.weighted,
        )
    table = 8 * shape.cells * (1 + engine.weighted) + code * shape.cells
    return table + 48 * pairs + _point_bytes(pairs, shape.dim, engine)


def _list_bytes(ids: int, dim: int, engine: Engine) -> int:
    """Where the pairs of `ids` are listed."""
    if engine.on_gpu:
        return _sklearn_bytes(ids, dim, engine) + gpu_budget.by_list(ids, dim, engine.weighted)
    return (64 + 16 * engine.weighted) * ids + _point_bytes(ids, dim, engine)


def _sample_bytes(shape: ChunkShape, sampled: int, engine: Engine) -> int:
    """Where the pairs of `sampled` ids are listed, and all ids get their codes after that."""
    listed = _list_bytes(sampled, shape.dim, engine)
    if engine.on_gpu:
        return max(listed, gpu_budget.by_id(shape.num_ids, shape.dim))
    block = assign_block(torch.device(engine.device), shape.dim)
    return listed + 100 * min(shape.num_ids, block)


def _point_bytes(points: int, dim: int, engine: Engine) -> int:
    """Beside pairs and weights: assignments, and what the backend makes of the points."""
    total = 16 * points
    if not engine.compiled:
        rows = min(points, BLOCK)
        total += rows * (72 * dim + 64) + (1 << 25)
        if engine.device != "cpu":
            total += 1 << 29  # scores of a block
    return total + _sklearn_bytes(points, dim, engine)


def _sklearn_bytes(points: int, dim: int, engine: Engine) -> int:
    if engine.backend not in SKLEARN_BACKENDS:
        return 0
    return points * (16 * dim + 32) + (1 << 25)


def _book_bytes(clusters: int, shape: ChunkShape, engine: Engine, has_scores: bool) -> int:
    """Fixed-point codebooks, sums, centroids and their temporaries."""
    each, helper_rows, dim, leveled = (40, 120), shape.helper_rows, shape.dim, 0
    if engine.on_gpu:  # kernels leave fewer temporaries, and pad coordinates to whole tiles
        each, helper_rows, dim = (20, 60), shape.helper_points, width(dim)
    elif shape.levels > 1:
        # Made level by level; scores want them as numbers too, and a metric in another space.
        leveled = 40 if engine.metric else 16 if has_scores else 4
        leveled *= shape.main_points + shape.helper_points
    total = (each[0] * (clusters + helper_rows) + each[1] * clusters + leveled) * dim + _SLACK
    if engine.init == "k-means++":
        total += 32 * clusters * (48 * dim + 64)
    return total
