"""One chunk of a table on this rank, as a clustering step finds it."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.distributed as dist

from cce_torchrec.clustering.budget import ChunkShape
from cce_torchrec.clustering.chunk_group import ALONE, ChunkGroup
from cce_torchrec.clustering.chunk_update import ChunkUpdate
from cce_torchrec.clustering.id_passes import ChunkIds
from cce_torchrec.codes.chunk_codes import ChunkCodes
from cce_torchrec.codes.counts import LEVELS
from cce_torchrec.codes.hashing import helper_hash
from cce_torchrec.kmeans.points import check_finite
from cce_torchrec.optimizer_state import reset_of
from cce_torchrec.packing import CodePacking

_NOT_FINITE = "nothing was clustered. Lower the learning rate, or restore the last checkpoint"


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
    holders: ChunkGroup = ALONE
    """The ranks that hold codes of the chunk's ids: several under ROW_WISE."""
    frozen: str = ""
    """Why its table is not trained and so left alone, as this rank sees it; empty if it is."""

    @property
    def owned(self) -> bool:
        """Whether the codebook is here."""
        return self.holders.owned

    @property
    def row_wise(self) -> bool:
        """Whether codes of other ids are on other ranks (ROW_WISE)."""
        return self.holders.group is not None

    @property
    def shape(self) -> ChunkShape:
        """Of the whole chunk."""
        config = self.codes.config
        return ChunkShape(
            num_ids=config.num_embeddings,
            num_rows=config.num_rows,
            helper_rows=config.helper_rows,
            dim=config.chunk_dim,
            levels=self.levels,
        )

    @functools.cached_property  # to read a number from a GPU is to wait for it
    def levels(self) -> int:
        """Of counts of its ids; 1 where they are not counted, or no batch was yet."""
        batches = self.codes.batches
        return 1 if batches is None or int(batches) == 0 else LEVELS

    @property
    def num_clusters(self) -> int:
        """Rows of main after the step."""
        config = self.codes.config
        return config.rows_per_chunk if self.finalize else config.num_rows

    @property
    def new_packing(self) -> CodePacking:
        """How codes lie after the step."""
        return CodePacking.of_rows(self.num_clusters)

    @property
    def chunk(self) -> int:
        """Number of the chunk in its table."""
        return self.codes.chunks[self.column]

    @property
    def name(self) -> str:
        """Table and chunk, for messages."""
        return f"table {self.codes.config.name!r}, chunk {self.chunk}"

    @property
    def ids(self) -> ChunkIds:
        """The ids of the chunk under its present hash."""
        codes, config = self.codes, self.codes.config
        return ChunkIds(
            codes=codes.stored,
            packing=codes.packing,
            column=self.column,
            num_rows=config.num_rows,
            helper_rows=config.helper_rows,
            hash=helper_hash(config.seed, config.name, self.chunk, codes.num_clusterings),
            local=codes.ids,
            num_ids=config.num_embeddings,
            counts=codes.counts if self.levels > 1 else None,
        )

    def check_group(self, group: dist.ProcessGroup | None) -> None:
        """Raises ValueError if codes of a ROW_WISE table are on ranks that are not in `group`."""
        if not self.row_wise:
            return
        ranks = dist.get_process_group_ranks(self.holders.group)
        called = dist.get_process_group_ranks(group)
        if not set(ranks) <= set(called):
            raise ValueError(
                f"{self.name}: its codes are on ranks {ranks} (ROW_WISE), cluster() was called on "
                f"ranks {called}; pass a process_group that has all of them"
            )

    def check(self) -> None:
        """Raises ValueError, naming table and chunk, if a weight is not finite.

        Or a value of the optimizer's state that the step averages.
        """
        try:
            check_finite(self.weight)
        except ValueError as error:
            raise ValueError(f"{self.name}: codebook {error}; {_NOT_FINITE}") from error
        for name, value in self.optimizer_state.items():
            # What is not averaged becomes zero, whatever it was.
            if reset_of(name).main_is_mean and not bool(torch.isfinite(value).all()):
                raise ValueError(
                    f"{self.name}: optimizer state {name!r} is not finite (NaN or infinite); "
                    f"{_NOT_FINITE}"
                )

    def commit(self, update: ChunkUpdate) -> None:
        """Writes `update` in place; the caller then counts the clustering in `ChunkCodes`."""
        with torch.no_grad():
            for part in update.codes:
                part.write()
            # In place: kernels, optimizers and the caller's own references keep the same tensors.
            if self.owned:
                self.weight.copy_(update.weight)
            for key, value in update.optimizer_state.items():
                self.optimizer_state[key].copy_(value)
