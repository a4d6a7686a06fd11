"""The sharder of CCEEmbeddingBagCollection: plans of logical tables, one parameter for each."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.embedding_types import BaseEmbeddingSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.types import (
    ParameterSharding,
    QuantizedCommCodecs,
    ShardingEnv,
    ShardingType,
)
from torchrec.modules.embedding_configs import data_type_to_dtype

from cce_torchrec.config import is_cce
from cce_torchrec.distributed.embedding_bag_collection import ShardedCCEEmbeddingBagCollection
from cce_torchrec.distributed.plan import SUPPORTED, check_world_size
from cce_torchrec.modules.embedding_bag_collection import CCEEmbeddingBagCollection
from cce_torchrec.table import physical_table
from cce_torchrec.torchrec_internals import copy_optimizer_in_backward


class CCEEmbeddingBagCollectionSharder(BaseEmbeddingSharder[CCEEmbeddingBagCollection]):
    """Shards `CCEEmbeddingBagCollection` by plans of logical tables.

    TABLE_WISE keeps the chunks of a table on one rank; COLUMN_WISE spreads them over ranks, and
    TABLE_COLUMN_WISE over those of one host. ROW_WISE is for codes too large for one rank: each
    has those of a block of ids, and the chunks' codebooks are spread. DATA_PARALLEL keeps all on
    every rank: such tables train by an optimizer of the user's, over `data_parallel_parameters`.

    Apply the fused optimizer before the plan is made, as for any TorchRec module.
    """

    def __init__(
        self,
        fused_params: dict[str, Any] | None = None,
        qcomm_codecs_registry: dict[str, QuantizedCommCodecs] | None = None,
    ) -> None:
        super().__init__(fused_params=fused_params, qcomm_codecs_registry=qcomm_codecs_registry)
        self._ebc_sharder = EmbeddingBagCollectionSharder(
            fused_params=fused_params, qcomm_codecs_registry=qcomm_codecs_registry
        )
        self.offers_row_wise = False
        """Whether planners on CPUs may cut tables by rows, which TorchRec offers on GPUs alone.

        A planner takes what it is offered for all tables, and its estimate knows nothing of the
        codes that are fetched. `make_planner` offers it for the tables that are to be cut.
        """

    def shard(
        self,
        module: CCEEmbeddingBagCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> ShardedCCEEmbeddingBagCollection:
        """The sharded form of `module` under the plan `params` of its logical tables."""
        device = device if device is not None else torch.device("cpu")
        # A group of the job's ranks has a plan of their numbers in the job.
        check_world_size(params, dist.get_world_size() if dist.is_initialized() else 1)
        return ShardedCCEEmbeddingBagCollection(
            module, params, self._ebc_sharder, env, device, module_fqn
        )

    def shardable_parameters(self, module: CCEEmbeddingBagCollection) -> dict[str, nn.Parameter]:
        """One parameter per logical table: the real one of a plain table, a proxy [k + k', D]."""
        real = self._ebc_sharder.shardable_parameters(module.embedding_bag_collection)
        out: dict[str, nn.Parameter] = {}
        for config in module.embedding_bag_configs():
            if not is_cce(config):
                out[config.name] = real[config.name]
                continue
            # Planners read its shape, type and optimizer alone, so it takes no memory.
            proxy = nn.Parameter(
                torch.empty(
                    config.rows_per_chunk,
                    config.embedding_dim,
                    dtype=data_type_to_dtype(config.data_type),
                    device="meta",
                )
            )
            # Without an optimizer in backward the planner would choose the dense kernel.
            copy_optimizer_in_backward(real[physical_table(config.name, 0)], proxy)
            out[config.name] = proxy
        return out

    def sharding_types(self, compute_device_type: str) -> list[str]:
        """Of those that TorchRec offers for its own collection, what places whole codebooks."""
        types = super().sharding_types(compute_device_type)
        if self.offers_row_wise:
            types = [*types, ShardingType.ROW_WISE.value]
        return [kind for kind in SUPPORTED if kind in types]

    @property
    def module_type(self) -> type[CCEEmbeddingBagCollection]:
        """The module this sharder takes."""
        return CCEEmbeddingBagCollection

    @property
    def sharded_module_type(self) -> type[ShardedCCEEmbeddingBagCollection]:
        """The module this sharder makes."""
        return ShardedCCEEmbeddingBagCollection
