"""Plans of logical tables by TorchRec's planner."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.distributed.types import ShardingPlan, ShardingType
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from cce_torchrec.config import CCEEmbeddingBagConfig
from cce_torchrec.distributed.embedding_bag_collection import get_default_sharders


def make_plan(
    model: nn.Module,
    tables: Sequence[EmbeddingBagConfig],
    device: torch.device,
    kind: str = "auto",
    batch_size: int = 512,
) -> ShardingPlan:
    """A collective plan of `model`: every rank of the default group calls it, all get the same.

    Args:
        kind: "tw" (chunks together), "cw" (chunks of a table spread over ranks) or "auto"
            (TorchRec's planner chooses table by table).
        batch_size: global.
    """
    world_size = dist.get_world_size()
    types = {
        "tw": [ShardingType.TABLE_WISE.value],
        "cw": [ShardingType.COLUMN_WISE.value],
        "auto": [ShardingType.TABLE_WISE.value, ShardingType.COLUMN_WISE.value],
    }[kind]
    constraints = {
        table.name: ParameterConstraints(
            sharding_types=types
            if isinstance(table, CCEEmbeddingBagConfig)
            else [ShardingType.TABLE_WISE.value],
            min_partition=table.chunk_dim if isinstance(table, CCEEmbeddingBagConfig) else None,
        )
        for table in tables
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice on topology and reservation, see planner notes
        planner = EmbeddingShardingPlanner(
            topology=Topology(world_size=world_size, compute_device=device.type),
            batch_size=max(1, batch_size // world_size),
            constraints=constraints,
        )
        assert dist.group.WORLD is not None
        return planner.collective_plan(model, get_default_sharders(), dist.group.WORLD)
