"""Plans of logical tables, and their fan-out to the chunks that TorchRec shards."""

from __future__ import annotations

from dataclasses import replace

from torch.distributed._shard.sharding_spec import EnumerableShardingSpec, ShardMetadata
from torchrec.distributed.types import ParameterSharding, ShardingType

from cce_torchrec.config import CCEEmbeddingBagConfig
from cce_torchrec.expand import physical_table

SUPPORTED = (ShardingType.TABLE_WISE.value, ShardingType.COLUMN_WISE.value)


def _rank(shard: ShardMetadata) -> int:
    assert shard.placement is not None
    rank = shard.placement.rank()
    assert rank is not None
    return rank


def check_world_size(params: dict[str, ParameterSharding], world_size: int) -> None:
    """Refuses a plan for more ranks than there are.

    Raises:
        ValueError: naming the table and the rank.
    """
    for table, sharding in params.items():
        spec = sharding.sharding_spec
        ranks = list(sharding.ranks or [])
        if isinstance(spec, EnumerableShardingSpec):
            ranks += [_rank(shard) for shard in spec.shards]
        if ranks and max(ranks) >= world_size:
            raise ValueError(
                f"table {table!r}: the plan puts it on rank {max(ranks)}, the job has "
                f"{world_size} ranks; make the plan for this number of ranks"
            )


def chunk_owners(config: CCEEmbeddingBagConfig, sharding: ParameterSharding) -> list[int]:
    """Rank that owns each chunk under a logical table's sharding.

    Raises:
        ValueError: another sharding type, or column shards that cut a chunk in two.
    """
    who = f"table {config.name!r}"
    if sharding.sharding_type not in SUPPORTED:
        raise ValueError(
            f"{who}: sharding_type {sharding.sharding_type!r} is not supported for CCE tables; "
            f"use one of {list(SUPPORTED)}"
        )
    spec = sharding.sharding_spec
    shards = spec.shards if isinstance(spec, EnumerableShardingSpec) else None
    if not shards:
        raise ValueError(f"{who}: its plan has no shards; make it with a TorchRec planner")
    owners: list[int | None] = [None] * config.num_chunks
    for shard in shards:
        start, width = shard.shard_offsets[1], shard.shard_sizes[1]
        if start % config.chunk_dim or width % config.chunk_dim:
            raise ValueError(
                f"{who}: a shard of columns [{start}, {start + width}) cuts a chunk of width "
                f"{config.chunk_dim}; set ParameterConstraints(min_partition={config.chunk_dim})"
            )
        for chunk in range(start // config.chunk_dim, (start + width) // config.chunk_dim):
            owners[chunk] = _rank(shard)
    if None in owners:
        raise ValueError(f"{who}: the shards of its plan do not cover all columns")
    return [owner for owner in owners if owner is not None]


def fan_out(
    config: CCEEmbeddingBagConfig, sharding: ParameterSharding
) -> dict[str, ParameterSharding]:
    """One table-wise ParameterSharding per chunk of `config`."""
    owners = chunk_owners(config, sharding)
    assert isinstance(sharding.sharding_spec, EnumerableShardingSpec)
    placements = {_rank(s): s.placement for s in sharding.sharding_spec.shards}
    return {
        physical_table(config.name, chunk): replace(
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
        for chunk, owner in enumerate(owners)
    }
