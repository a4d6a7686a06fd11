"""The clustering step of one chunk: a pure computation in stages, and the write that commits it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from cce_torchrec.clustering.exact_sums import weighted_sums
from cce_torchrec.clustering.id_passes import ChunkIds, NewCodes
from cce_torchrec.codes.chunk_codes import ChunkCodes
from cce_torchrec.codes.hashing import helper_hash
from cce_torchrec.codes.storage import code_dtype
from cce_torchrec.kmeans.lloyd import KMeansResult
from cce_torchrec.kmeans.points import PairPoints, check_finite
from cce_torchrec.optimizer_state import reset_of

_NOT_FINITE = "nothing was clustered. Lower the learning rate, or restore the last checkpoint"


@dataclass(frozen=True)
class CodePlacement:
    """The ranks that hold codes of a ROW_WISE table, and which of them holds a chunk's codebook."""

    group: dist.ProcessGroup
    owner: int
    """Rank in the group."""

    @property
    def owned(self) -> bool:
        """Whether the codebook is on this rank."""
        return dist.get_rank(self.group) == self.owner


@dataclass
class ChunkState:
    """Live views of one chunk: what a clustering step reads and, when it commits, rewrites."""

    codes: ChunkCodes
    column: int
    """Column of `codes` that holds this chunk."""
    weight: torch.Tensor
    """[k + k', s]: main, then helper; empty where only codes of a ROW_WISE table are."""
    optimizer_state: dict[str, torch.Tensor]
    """Tensors whose first dimension is k + k'."""
    finalize: bool = False
    """Whether main is given the helper's rows: k + k' clusters, and no helper after the step."""
    replicas: dist.ProcessGroup | None = None
    """The ranks that hold a copy of this chunk, where there are such (data-parallel, 2D)."""
    blocks: CodePlacement | None = None
    """Where the codes are, if those of other ids are on other ranks (ROW_WISE)."""

    @property
    def owned(self) -> bool:
        """Whether the codebook is here."""
        return self.blocks is None or self.blocks.owned

    @property
    def num_clusters(self) -> int:
        """Rows of main after the step."""
        config = self.codes.config
        return config.rows_per_chunk if self.finalize else config.num_rows

    @property
    def new_dtype(self) -> torch.dtype:
        """Storage type of codes after the step."""
        return code_dtype(self.num_clusters)

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
        hash_ = helper_hash(config.seed, config.name, self.chunk, codes.num_clusterings)
        return ChunkIds(
            codes=codes.codes,
            column=self.column,
            num_rows=config.num_rows,
            helper_rows=config.helper_rows,
            hash=hash_,
            held=codes.ids,
            num_ids=config.num_embeddings,
        )

    def check_group(self, group: dist.ProcessGroup | None) -> None:
        """Raises ValueError if codes of a ROW_WISE table are on ranks that are not in `group`."""
        if self.blocks is None:
            return
        ranks = dist.get_process_group_ranks(self.blocks.group)
        called = dist.get_process_group_ranks(group)
        if not set(ranks) <= set(called):
            raise ValueError(
                f"{self.who}: its codes are on ranks {ranks} (ROW_WISE), cluster() was called on "
                f"ranks {called}; pass a process_group that has all of them"
            )

    def check(self) -> None:
        """Raises ValueError, naming table and chunk, if a weight is not finite.

        Or a value of the optimizer's state that the step averages.
        """
        try:
            check_finite(self.weight)
        except ValueError as error:
            raise ValueError(f"{self.who}: codebook {error}; {_NOT_FINITE}") from error
        for name, value in self.optimizer_state.items():
            if reset_of(name).main_is_mean and not bool(torch.isfinite(value).all()):
                raise ValueError(
                    f"{self.who}: optimizer state {name!r} is not finite (NaN or infinite); "
                    f"{_NOT_FINITE}"
                )


@dataclass
class ChunkUpdate:
    """What a clustering step will write; `codes` is empty where they are found at the commit."""

    weight: torch.Tensor
    """float32 [k + k', s]."""
    optimizer_state: dict[str, torch.Tensor]
    objective_before: float
    objective_after: float
    empty_clusters: int
    scored: torch.Tensor
    """[k, s]: what the nearest of is an id's new code, in the space of the metric."""
    codes: list[NewCodes] | None = None
    changed: int = 0


def new_main_rows(state: ChunkState, points: PairPoints, result: KMeansResult) -> ChunkUpdate:
    """New main rows and optimizer state, from the K-means `result` over the chunk's pairs."""
    k, config = state.num_clusters, state.codes.config
    shape, device = (config.rows_per_chunk, config.chunk_dim), points.main.device
    weight = torch.zeros(shape, dtype=torch.float32, device=device)
    weight[:k] = result.centroids
    # Counts are exact in any order: integers, and all weights sum to 2^33 at most (MAX_WEIGHT),
    # far below 2^53.
    norms = (points.helper.double() / points.scale).square().sum(1)
    counts = torch.zeros_like(norms, dtype=torch.int64).index_add_(0, points.b, points.weights)
    return ChunkUpdate(
        weight=weight,
        optimizer_state={
            key: _new_optimizer_state(key, value, points, result)
            for key, value in state.optimizer_state.items()
        },
        objective_before=float((norms * counts.double()).sum()),
        objective_after=result.objective[-1],
        empty_clusters=result.empty_clusters,
        scored=result.scored,
    )


class Relabelling:
    """Takes the new codes of a chunk, part by part, before they are written.

    Without a helper after the step only changed codes are counted.
    """

    def __init__(self, state: ChunkState, points: PairPoints, update: ChunkUpdate) -> None:
        config = state.codes.config
        self._points, self._update, self._finalize = points, update, state.finalize
        self._hash = helper_hash(
            config.seed, config.name, state.chunk, state.codes.num_clusterings + 1
        )
        main = update.weight[: state.num_clusters]
        self._centroids = (main.double() * points.scale).round().int()
        device = points.helper.device
        self._sums = torch.zeros(points.helper.shape, dtype=torch.int64, device=device)
        self._sizes = torch.zeros(len(self._sums), dtype=torch.int64, device=device)
        self._changed = torch.zeros(1, dtype=torch.int64, device=device)

    def take(self, part: NewCodes) -> None:
        """Adds the residuals of the ids of `part`, and counts those whose code changes."""
        if not self._finalize:
            stats = (self._sums, self._sizes)
            part.add_residuals(self._points, self._centroids, self._hash, stats)
        self._changed += part.changed()

    def add_up(self, group: dist.ProcessGroup) -> None:
        """Takes what other ranks took of their ids; collective."""
        own = (self._sums.view(-1), self._sizes, self._changed)
        flat = torch.cat(own)
        dist.all_reduce(flat, group=group)
        sums, self._sizes, self._changed = flat.split([len(part) for part in own])
        self._sums = sums.view(self._sums.shape)

    def finish(self) -> None:
        """Helper rows become mean residuals under the new hash, or zero where there are none."""
        self._update.changed = int(self._changed)
        if self._finalize:
            return
        means = self._sums.double() / self._sizes.clamp(min=1)[:, None] / self._points.scale
        self._update.weight[len(self._centroids) :] = means.float()


def commit(state: ChunkState, new: ChunkUpdate) -> None:
    """Writes `new` in place; the caller then counts the clustering in `ChunkCodes`."""
    with torch.no_grad():
        for part in new.codes or []:
            part.write()
        if state.owned:
            state.weight.copy_(new.weight)
        for key, value in new.optimizer_state.items():
            state.optimizer_state[key].copy_(value)


def _new_optimizer_state(
    name: str, old: torch.Tensor, points: PairPoints, result: KMeansResult
) -> torch.Tensor:
    """Main: mean over the ids of the cluster, or zero. Helper: a share of the old one's mean."""
    new, reset = torch.zeros_like(old), reset_of(name)
    if not reset.main_is_mean:
        return new
    old_rows, new_rows = len(points.main), len(result.centroids)
    main = old[:old_rows].double().reshape(old_rows, -1)
    sums = weighted_sums(main, points.a, points.weights, result.assignment, new_rows)
    sizes = result.sizes[:, None]
    means = torch.where(sizes > 0, sums / sizes.clamp(min=1), main.mean(0))
    new[:new_rows] = means.reshape(new[:new_rows].shape).to(old.dtype)
    if new_rows < len(new):
        helper_mean = old[old_rows:].double().mean(0)
        new[new_rows:] = (reset.helper_share * helper_mean).to(old.dtype)
    return new
