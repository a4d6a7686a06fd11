"""The shards of a table's entry in a plan, and the ranks that they are on."""

from __future__ import annotations

from torchrec.distributed.types import EnumerableShardingSpec, ParameterSharding

from cce_torchrec.torchrec_internals import ShardMetadata


def placed_shards(table: str, sharding: ParameterSharding) -> list[tuple[int, ShardMetadata]]:
    """Each shard of `table` with its rank; none of a data-parallel table.

    Raises:
        ValueError: a shard without a rank.
    """
    spec = sharding.sharding_spec
    placed = []
    for shard in spec.shards if isinstance(spec, EnumerableShardingSpec) else []:
        # torch allows shards without a placement, and placements without a rank.
        rank = shard.placement.rank() if shard.placement is not None else None
        if rank is None:
            raise ValueError(
                f"table {table!r}: its plan has a shard without a rank; make it with a TorchRec "
                "planner"
            )
        placed.append((rank, shard))
    return placed
