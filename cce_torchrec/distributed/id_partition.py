"""ROW_WISE for a CCE table: which rank has the codes of which ids, and where its codebooks are."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torchrec.distributed.types import ParameterSharding, ShardingType

from cce_torchrec.config import CCEEmbeddingBagConfig
from cce_torchrec.distributed.shards import placed_shards
from cce_torchrec.packing import GROUP


def is_row_wise(sharding: ParameterSharding) -> bool:
    """Whether a table is cut by rows: of a CCE table, its codes by ids."""
    return sharding.sharding_type == ShardingType.ROW_WISE.value


@dataclass(frozen=True)
class IdPartition:
    """Equal blocks of neighbouring ids of one table, one for each of `ranks` in turn."""

    num_embeddings: int
    ranks: tuple[int, ...]

    @classmethod
    def from_plan(cls, config: CCEEmbeddingBagConfig, sharding: ParameterSharding) -> IdPartition:
        """The blocks under a ROW_WISE plan, whose shards name the ranks.

        Raises:
            ValueError: a plan without shards.
        """
        ranks = tuple(rank for rank, _ in placed_shards(config.name, sharding))
        if not ranks:
            raise ValueError(
                f"table {config.name!r}: its ROW_WISE plan has no shards; make it with a TorchRec "
                "planner"
            )
        return cls(config.num_embeddings, ranks)

    @property
    def size(self) -> int:
        """Ids of every block but the last ones."""
        per_rank = -(-self.num_embeddings // len(self.ranks))
        # Packed codes and the bits of seen ids are cut at whole bytes.
        return -(-per_rank // GROUP) * GROUP

    def ids(self, rank: int) -> range:
        """Ids whose codes `rank` has."""
        first = self.ranks.index(rank) * self.size
        return range(min(first, self.num_embeddings), min(first + self.size, self.num_embeddings))

    def cuts(self, rising: torch.Tensor) -> torch.Tensor:
        """Where `rising` ids [U] are cut into blocks, int64 [ranks + 1]."""
        starts = torch.arange(len(self.ranks) + 1, device=rising.device) * self.size
        return torch.searchsorted(rising, starts)


def check_group(partitions: dict[str, IdPartition], group: dist.ProcessGroup | None) -> None:
    """Refuses ROW_WISE tables that are not on all ranks of `group`, in its order.

    Raises:
        ValueError: naming the table and both.
    """
    ranks = dist.get_process_group_ranks(group) if dist.is_initialized() else [0]
    for table, partition in partitions.items():
        if list(partition.ranks) != ranks:
            raise ValueError(
                f"table {table!r}: its ROW_WISE plan has shards on ranks {list(partition.ranks)}, "
                f"and ids are exchanged among all ranks of the group, {ranks}; give each one shard"
            )


def codebook_owners(config: CCEEmbeddingBagConfig, partition: IdPartition) -> list[int]:
    """Rank of each chunk's codebook: spread evenly, from a rank that follows from the name."""
    ranks, chunks = partition.ranks, config.num_chunks
    # Not from the first rank, which would have a codebook of every table; and not by `hash`, which
    # differs from process to process.
    first = zlib.crc32(config.name.encode())
    return [ranks[(first + chunk * len(ranks) // chunks) % len(ranks)] for chunk in range(chunks)]
