"""Tables in columns: for which of them a plan may want that, and how long their shards take."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torchrec.distributed.planner.types import ShardEstimator, ShardingOption
from torchrec.distributed.types import ShardingType
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from cce_torchrec.config import is_cce
from cce_torchrec.modules.compress import full_bytes

_SMALL = 1 / 8
"""Share of a rank's time up to which a table is placed whole; moving it balances ranks as well."""
_AMPLE = 4
"""How often the tables fit where memory has no say: state of optimizers comes on top of them."""


def worth_splitting(tables: Sequence[EmbeddingBagConfig], world_size: int, room: float) -> set[str]:
    """Names of the tables that a plan may want to split into columns.

    The planner's work grows with the forms of all tables together, and a job has few large tables
    or is balanced without splitting any.

    Args:
        room: bytes of a rank for tables.
    """
    stored = {table.name: _bytes(table) for table in tables}
    if _AMPLE * sum(stored.values()) > world_size * room:
        return set(stored)  # then each piece that is moved counts
    # What planners count in a lookup: values that are read for an example.
    read = {table.name: _rows(table) * table.embedding_dim for table in tables}
    small = _SMALL * sum(read.values()) / world_size
    return {name for name in read if read[name] > small or stored[name] > _SMALL * room}


def _bytes(table: EmbeddingBagConfig) -> int:
    return table.table_bytes if is_cce(table) else full_bytes(table)


def _rows(table: EmbeddingBagConfig) -> int:
    return len(table.feature_names) * (table.rows_per_id if is_cce(table) else 1)


class ColumnsAlike(ShardEstimator):
    """Estimates one of a table's columns for all of them, which are of one size.

    Args:
        estimator: whose estimate of a shard depends on the size of this shard alone.
    """

    def __init__(self, estimator: ShardEstimator) -> None:
        self._estimator = estimator

    def estimate(
        self, sharding_options: list[ShardingOption], sharder_data_map: Any = None, **named: Any
    ) -> None:
        """Writes the time of every shard in place."""
        alike = [(option, option.shards) for option in sharding_options if _in_columns(option)]
        for option, shards in alike:
            option.shards = shards[:1]
        self._estimator.estimate(sharding_options, sharder_data_map, **named)
        for option, shards in alike:
            option.shards = shards
            for shard in shards[1:]:
                shard.perf = copy.copy(shards[0].perf)


def _in_columns(option: ShardingOption) -> bool:
    """Whether it is columns of one size; those of a plain table may have a narrower last one."""
    sizes = {tuple(shard.size) for shard in option.shards}
    return option.sharding_type == ShardingType.COLUMN_WISE.value and len(sizes) == 1
