"""Plans of logical tables, and their fan-out to the chunks that TorchRec shards."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from torchrec.distributed.types import ParameterSharding, ShardingType
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from cce_torchrec.config import CCEEmbeddingBagConfig, is_cce
from cce_torchrec.distributed.id_partition import IdPartition, codebook_owners, is_row_wise
from cce_torchrec.distributed.shards import placed_shards
from cce_torchrec.lookup.backward import fits
from cce_torchrec.table import physical_table
from cce_torchrec.torchrec_internals import (
    EnumerableShardingSpec,
    ShardMetadata,
)

logger = logging.getLogger(__name__)

SUPPORTED = (
    ShardingType.TABLE_WISE.value,
    ShardingType.COLUMN_WISE.value,
    ShardingType.TABLE_COLUMN_WISE.value,
    ShardingType.DATA_PARALLEL.value,
    ShardingType.ROW_WISE.value,
)


def is_data_parallel(sharding: ParameterSharding) -> bool:
    """Whether a table is whole on every rank."""
    return sharding.sharding_type == ShardingType.DATA_PARALLEL.value


def check_world_size(params: dict[str, ParameterSharding], world_size: int) -> None:
    """Refuses a plan for more ranks than there are.

    Raises:
        ValueError: naming the table and the rank.
    """
    for table, sharding in params.items():
        # A data-parallel table has ranks, and no shards.
        ranks = [*(sharding.ranks or []), *(rank for rank, _ in placed_shards(table, sharding))]
        if ranks and max(ranks) >= world_size:
            raise ValueError(
                f"table {table!r}: the plan puts it on rank {max(ranks)}, the job has "
                f"{world_size} ranks; make the plan for this number of ranks"
            )


def chunk_owners(config: CCEEmbeddingBagConfig, sharding: ParameterSharding) -> list[int]:
    """Rank that owns each chunk's codebook under a logical table's sharding.

    Raises:
        ValueError: column shards that cut a chunk in two.
    """
    if is_row_wise(sharding):
        return codebook_owners(config, IdPartition.from_plan(config, sharding))
    table = f"table {config.name!r}"
    shards = placed_shards(config.name, sharding)
    if not shards:
        raise ValueError(f"{table}: its plan has no shards; make it with a TorchRec planner")
    owners: list[int | None] = [None] * config.num_chunks
    for rank, shard in shards:
        start, width = shard.shard_offsets[1], shard.shard_sizes[1]
        if start % config.chunk_dim or width % config.chunk_dim:
            raise ValueError(
                f"{table}: a shard of columns [{start}, {start + width}) cuts a chunk of width "
                f"{config.chunk_dim}; set ParameterConstraints(min_partition={config.chunk_dim})"
            )
        for chunk in range(start // config.chunk_dim, (start + width) // config.chunk_dim):
            owners[chunk] = rank
    if None in owners:
        raise ValueError(f"{table}: the shards of its plan do not cover all columns")
    return [owner for owner in owners if owner is not None]


def fan_out(
    config: EmbeddingBagConfig, sharding: ParameterSharding
) -> dict[str, ParameterSharding]:
    """The plan of TorchRec's tables behind `config`: its chunks, or the plain table itself.

    Raises:
        ValueError: a sharding type that cuts codebooks by rows, or rows and columns at once.
    """
    if sharding.sharding_type not in SUPPORTED:
        raise ValueError(
            f"table {config.name!r}: sharding_type {sharding.sharding_type!r} is not for the "
            f"tables of a CCE collection; use one of {list(SUPPORTED)}"
        )
    if not is_cce(config):
        return {config.name: sharding}
    tables = [physical_table(config.name, chunk) for chunk in range(config.num_chunks)]
    if is_data_parallel(sharding):
        return dict.fromkeys(tables, sharding)
    owners = chunk_owners(config, sharding)
    # A placement names the device too, so a chunk takes that of a shard on its owner.
    placements = {rank: shard.placement for rank, shard in placed_shards(config.name, sharding)}
    return {
        table: replace(
            sharding,
            sharding_type=ShardingType.TABLE_WISE.value,
            ranks=[owner],
            sharding_spec=EnumerableShardingSpec(
                [
                    ShardMetadata(
                        shard_offsets=[0, 0],
                        shard_sizes=[config.rows_per_chunk, config.chunk_dim],
                        placement=placements[owner],
                    )
                ]
            ),
        )
        for table, owner in zip(tables, owners, strict=True)
    }


def physical_plan(
    configs: Sequence[EmbeddingBagConfig],
    params: dict[str, ParameterSharding],
    device: torch.device,
) -> dict[str, ParameterSharding]:
    """The plan of the tables that TorchRec shards, from that of the logical ones."""
    out = {}
    for config in configs:
        shape = (config.num_embeddings, config.embedding_dim)
        if is_cce(config):
            shape = (config.rows_per_chunk, config.chunk_dim)
        # On a CPU, large tables are kept apart from those that have our backward: TorchRec groups
        # tables of equal parameters, and `enforce_hbm` means nothing there.
        apart = device.type == "cpu" and not fits(*shape)
        for name, sharding in fan_out(config, params[config.name]).items():
            # Ids are checked before expansion; FBGEMM would pass over all rows once more.
            hbm = True if apart else sharding.enforce_hbm
            out[name] = replace(sharding, bounds_check_mode=BoundsCheckMode.NONE, enforce_hbm=hbm)
    return out
