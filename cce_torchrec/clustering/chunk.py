"""The clustering step of one chunk: a pure computation in stages, and the write that commits it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from cce_torchrec.clustering.ids import ChunkIds, CodeColumn, NewCodes, PairTable
from cce_torchrec.codes import code_dtype, pack
from cce_torchrec.expand import ChunkCodes
from cce_torchrec.hashing import SAMPLE_ROLE, hash_function, helper_hash
from cce_torchrec.kmeans.backends import Backend
from cce_torchrec.kmeans.lloyd import KMeansResult
from cce_torchrec.kmeans.points import PairPoints, check_finite, metric_root

_FIRST_MOMENTS = ("exp_avg", "momentum_buffer", "momentum")
_SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq")
_ASSIGN_BLOCK = 1 << 20
SAMPLES_PER_CENTROID = 200
"""Ids per cluster that K-means sees where all distinct pairs would not fit (kmeans-notes)."""


@dataclass
class ChunkState:
    """Live views of one chunk: what a clustering step reads and, when it commits, rewrites."""

    codes: ChunkCodes
    column: int
    """Column of `codes` that holds this chunk."""
    weight: torch.Tensor
    """[k + k', s]: main, then helper."""
    optimizer_state: dict[str, torch.Tensor]
    """Tensors whose first dimension is k + k'."""
    replicas: dist.ProcessGroup | None = None
    """The ranks that hold a copy of this chunk, where there are such (data-parallel, 2D)."""

    @property
    def chunk(self) -> int:
        """Number of the chunk in its table."""
        return self.codes.chunks[self.column]

    @property
    def who(self) -> str:
        """Table and chunk, for messages."""
        return f"table {self.codes.config.name!r}, chunk {self.chunk}"

    @property
    def ids(self) -> ChunkIds:
        """The ids of the chunk under its present hash."""
        codes, config = self.codes, self.codes.config
        assert codes.codes is not None
        hash_ = helper_hash(config.seed, config.name, self.chunk, codes.rounds)
        return ChunkIds(codes.codes, self.column, config.num_rows, config.helper_rows, hash_)

    def check(self) -> None:
        """Raises ValueError, naming table and chunk, if a weight is not finite."""
        try:
            check_finite(self.weight)
        except ValueError as error:
            raise ValueError(
                f"{self.who}: codebook {error}; nothing was clustered. Lower the learning rate, "
                "or restore the last checkpoint"
            ) from error


@dataclass
class ChunkUpdate:
    """What a clustering step will write."""

    codes: NewCodes
    weight: torch.Tensor
    optimizer_state: dict[str, torch.Tensor]
    objective_before: float
    objective_after: float
    changed: float
    empty_clusters: int


@dataclass(frozen=True)
class Budget:
    """How the pairs of a chunk are found, known from its shape alone, and the memory it takes."""

    by_pair: bool
    """A table over all k * k' pairs; otherwise a list of the pairs of (sampled) ids."""
    samples_per_centroid: int | None
    """None: all ids."""
    working_bytes: int
    """Peak beside the model while the chunk is clustered."""
    pending_bytes: int
    """Kept until all chunks commit."""


def budget(
    num_ids: int,
    num_rows: int,
    helper_rows: int,
    dim: int,
    memory_limit: int,
    samples_per_centroid: int | None = None,
    weighted: bool = False,
) -> Budget:
    """How a chunk of this shape is clustered within `memory_limit` bytes."""
    cells = num_rows * helper_rows
    pairs = min(num_ids, cells)
    scores = 4 * (num_rows + helper_rows) * (num_rows + 128)
    books = 24 * (num_rows + helper_rows) * dim + (10 * num_ids + 8 * pairs) * weighted
    column = num_ids * code_dtype(num_rows).itemsize
    # Counts and keys of pairs, then a, b, weight, nearest and distance per pair, and the table.
    by_pair = 8 * cells + 48 * pairs + 4 * cells + scores + books
    pairs_repeat = cells <= max(2 * num_ids, 1 << 20)
    if samples_per_centroid is None and pairs_repeat and by_pair <= memory_limit:
        return Budget(True, None, by_pair, 4 * cells)
    block = 64 * min(num_ids, _ASSIGN_BLOCK) + scores + books
    if samples_per_centroid is None and 64 * num_ids + column + block <= memory_limit:
        return Budget(False, None, 64 * num_ids + column + block, column)
    samples = samples_per_centroid or SAMPLES_PER_CENTROID
    sampled = 64 * min(num_ids, samples * num_rows) + column + block
    return Budget(False, samples, sampled, column)


@dataclass
class Sampled:
    """The pairs of a chunk that K-means runs over, and where they come from."""

    ids: ChunkIds
    keys: torch.Tensor
    """int64 [P], rising."""
    points: PairPoints
    plan: Budget
    pair_of_id: torch.Tensor | None = None
    """int32 [N], where the pairs of all ids were listed: position in `keys`."""


def find_pairs(state: ChunkState, plan: Budget, weights: torch.Tensor | None = None) -> Sampled:
    """Distinct pairs of the chunk's ids (or of a sample of them, drawn by hash)."""
    ids, config = state.ids, state.codes.config
    sample = hash_function(config.seed, config.name, state.chunk, SAMPLE_ROLE, state.codes.rounds)
    pair_of_id = None
    if plan.by_pair:
        grid = ids.count_pairs()
        keys = grid.nonzero().view(-1)
        counts = (grid if weights is None else ids.count_pairs(weights))[keys]
        del grid
    else:
        kept = []
        share = 1.0
        if plan.samples_per_centroid is not None:
            share = min(1.0, plan.samples_per_centroid * ids.num_rows / ids.num_ids)
        threshold = round(share * 2**31)
        for block in ids.blocks():
            kept.append(block[sample.bits31(block) < threshold])
        taken = torch.cat(kept)
        if not len(taken):  # a handful of ids, all hashed above the threshold
            taken = torch.arange(min(ids.num_ids, ids.num_rows), device=taken.device)
        keys, inverse = torch.unique(ids.keys(taken), return_inverse=True)
        one = torch.ones_like(taken) if weights is None else weights[taken]
        counts = torch.zeros_like(keys).index_add_(0, inverse, one)
        if len(taken) == ids.num_ids:
            pair_of_id = inverse.int()
    if not bool(counts.any()):
        counts = torch.ones_like(counts)  # nothing was seen: uniform, as without weights
    starts = ids.starts(
        sample, 4 * config.num_rows if weights is not None else config.num_rows, keys
    )
    if weights is not None:
        starts = starts[counts[starts] > 0]
    k = config.num_rows
    weight = state.weight.detach()
    points = PairPoints(
        weight[:k],
        weight[k:],
        (keys // config.helper_rows).int(),
        (keys % config.helper_rows).int(),
        counts,
        starts,
    )
    return Sampled(ids, keys, points, plan, pair_of_id)


def new_codes_of(
    sampled: Sampled, result: KMeansResult, backend: Backend, metric: torch.Tensor | None = None
) -> NewCodes:
    """New codes of all ids: by lookup where K-means saw all their pairs, otherwise by scoring."""
    if sampled.plan.by_pair:
        return PairTable(sampled.ids, sampled.keys, result.assignment)
    if sampled.pair_of_id is not None:
        column = pack(result.assignment[sampled.pair_of_id], sampled.ids.codes.dtype)
        return CodeColumn(sampled.ids, column)
    return assign_ids(sampled, result.centroids, backend, metric)


def finish(
    state: ChunkState,
    sampled: Sampled,
    result: KMeansResult,
    backend: Backend,
    metric: torch.Tensor | None = None,
) -> ChunkUpdate:
    """What the step will write, from the K-means `result` over the chunk's pairs."""
    config, points, ids = state.codes.config, sampled.points, sampled.ids
    k = config.num_rows
    new_codes = new_codes_of(sampled, result, backend, metric)
    new_hash = helper_hash(config.seed, config.name, state.chunk, state.codes.rounds + 1)
    centroids = (result.centroids.double() * points.scale).round().int()
    sums, sizes = new_codes.residuals(points, centroids, new_hash)
    new_weight = torch.empty_like(state.weight, dtype=torch.float32)
    new_weight[:k] = result.centroids
    new_weight[k:] = (sums.double() / sizes.clamp(min=1)[:, None] / points.scale).float()
    before = (points.helper.double() / points.scale).square().sum(1)[points.b.long()]
    return ChunkUpdate(
        codes=new_codes,
        weight=new_weight,
        optimizer_state={
            key: _new_optimizer_state(key, value, points, result, k)
            for key, value in state.optimizer_state.items()
        },
        objective_before=float((before * points.weights).sum()),
        objective_after=result.objective[-1],
        changed=new_codes.changed() / ids.num_ids,
        empty_clusters=result.empty_clusters,
    )


def assign_ids(
    sampled: Sampled, centroids: torch.Tensor, backend: Backend, metric: torch.Tensor | None = None
) -> CodeColumn:
    """Nearest centroid of every id, block by block."""
    ids, points = sampled.ids, sampled.points
    column = torch.empty(ids.num_ids, dtype=ids.codes.dtype, device=ids.codes.device)
    main, helper = points.codebooks()
    if metric is not None:
        root = metric_root(metric, points.dim).to(main.device)
        main, helper, centroids = main @ root, helper @ root, centroids @ root
    for start in range(0, ids.num_ids, _ASSIGN_BLOCK):
        block = torch.arange(start, min(start + _ASSIGN_BLOCK, ids.num_ids), device=column.device)
        keys, inverse = torch.unique(ids.keys(block), return_inverse=True)
        a, b = (keys // ids.helper_rows).int(), (keys % ids.helper_rows).int()
        pairs = PairPoints(main, helper, a, b, torch.ones_like(keys), keys[:0])
        nearest = backend.prepare(pairs, centroids)(0, pairs.num_points)
        column[block] = pack(nearest[inverse], column.dtype)
    return CodeColumn(ids, column)


def commit(state: ChunkState, new: ChunkUpdate) -> None:
    """Writes `new` in place; the caller then counts the clustering in `ChunkCodes`."""
    with torch.no_grad():
        new.codes.write()
        state.weight.copy_(new.weight)
        for key, value in new.optimizer_state.items():
            state.optimizer_state[key].copy_(value)


def _new_optimizer_state(
    name: str, old: torch.Tensor, points: PairPoints, result: KMeansResult, num_rows: int
) -> torch.Tensor:
    """Main: mean over the ids of the cluster. Helper: zero, for Adam's second moment its mean.

    First moments restart at zero everywhere. Measured on ML-1M and flights: zeroing the helper's
    state is worth 0.008 to 0.016 of log loss; a zero second moment would make Adam take steps of
    several times lr.
    """
    new = torch.zeros_like(old)
    if name in _FIRST_MOMENTS:
        return new
    main = old[:num_rows].double().reshape(num_rows, -1)
    weighted = main[points.a.long()] * points.weights[:, None]
    sums = torch.zeros_like(main).index_add_(0, result.assignment.long(), weighted)
    sizes = result.sizes[:, None]
    means = torch.where(sizes > 0, sums / sizes.clamp(min=1), main.mean(0))
    new[:num_rows] = means.reshape(new[:num_rows].shape).to(old.dtype)
    if name in _SECOND_MOMENTS:
        new[num_rows:] = old[num_rows:].double().mean(0).to(old.dtype)
    return new
