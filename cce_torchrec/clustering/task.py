"""A chunk to be clustered, as every rank hears of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cce_torchrec.clustering.budget import Budget, ChunkShape, assign_block
from cce_torchrec.codes.hashing import HashFunction, helper_hash

ChunkKey = tuple[str, int]
"""Path of a table and number of a chunk: the chunk in the model."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What the owner of a chunk tells the other ranks of it."""

    path: str
    table: str
    chunk: int
    shape: ChunkShape
    seed: int
    """Of the table's hashes."""
    num_clusterings: int
    """So far."""
    num_clusters: int
    budget: Budget
    update_bytes: int
    """New codebook and optimizer state, which wait until all chunks commit, and codes that become
    wider."""
    row_wise: bool = False
    """Whether its codes are spread over ranks by ids."""

    @property
    def key(self) -> ChunkKey:
        """Identifies the chunk in the model."""
        return self.path, self.chunk

    @property
    def name(self) -> str:
        """Table and chunk, for messages."""
        return f"table {self.table!r}, chunk {self.chunk}"

    @property
    def span(self) -> str:
        """The chunk's part of a profile, to which phases are added."""
        return f"cluster {self.path}, chunk {self.chunk}"

    @property
    def codebook_shape(self) -> tuple[int, int]:
        """Rows of main and helper together, and their width."""
        return self.shape.num_rows + self.shape.helper_rows, self.shape.dim

    @property
    def finalize(self) -> bool:
        """Whether main takes over the helper's rows."""
        return self.num_clusters > self.shape.num_rows

    @property
    def sees_all_ids(self) -> bool:
        """Whether K-means sees the pairs of all ids, not of a sample of them."""
        return self.budget.samples_per_centroid is None

    def id_blocks(self, device: torch.device) -> range:
        """First ids of the blocks in which ids get their codes, where K-means saw a sample."""
        return range(0, self.shape.num_ids, assign_block(device, self.shape.dim))

    @property
    def new_helper_hash(self) -> HashFunction:
        """What sends ids to their helper rows after the step."""
        return helper_hash(self.seed, self.table, self.chunk, self.num_clusterings + 1)

    @property
    def scores(self) -> int:
        """Of a pass over its pairs."""
        pairs = min(self.shape.num_ids, self.shape.cells)
        return self.num_clusters * pairs
