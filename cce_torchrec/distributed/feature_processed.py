"""TorchRec's FeatureProcessedEmbeddingBagCollection around a CCE collection, sharded.

Its processors compute per-sample weights where the ids are looked up; the expansion repeats the
weights with the rows, so their gradients are those of TorchRec's kernels.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torchrec.distributed.fp_embeddingbag import (
    FeatureProcessedEmbeddingBagCollectionSharder,
    ShardedFeatureProcessedEmbeddingBagCollection,
)
from torchrec.distributed.types import ParameterSharding, QuantizedCommCodecs, ShardingEnv
from torchrec.distributed.utils import append_prefix
from torchrec.modules.fp_embedding_modules import FeatureProcessedEmbeddingBagCollection

from cce_torchrec.distributed.embedding_bag_sharder import CCEEmbeddingBagCollectionSharder
from cce_torchrec.distributed.id_partition import is_row_wise
from cce_torchrec.modules.embedding_bag_collection import CCEEmbeddingBagCollection
from cce_torchrec.torchrec_internals import PROCESSED_COLLECTION, processed_collection


class ShardedFeatureProcessedCCE(ShardedFeatureProcessedEmbeddingBagCollection):
    """TorchRec's module, which here also keeps DDP away from the codes."""

    def sharded_parameter_names(self, prefix: str = "") -> Iterator[str]:
        """Names of the collection's parameters and codes; the processors are left to DDP."""
        yield from super().sharded_parameter_names(prefix)
        for name, _ in processed_collection(self).named_buffers():
            yield append_prefix(prefix, f"{PROCESSED_COLLECTION}.{name}")


class FeatureProcessedSharder(FeatureProcessedEmbeddingBagCollectionSharder):
    """TorchRec's sharder, which hands CCE collections to `CCEEmbeddingBagCollectionSharder`.

    Args:
        ebc_sharder: that of CCE collections, where it is not one by default.
        qcomm_codecs_registry: of the outputs of all collections.
    """

    def __init__(
        self,
        ebc_sharder: CCEEmbeddingBagCollectionSharder | None = None,
        qcomm_codecs_registry: dict[str, QuantizedCommCodecs] | None = None,
    ) -> None:
        super().__init__(qcomm_codecs_registry=qcomm_codecs_registry)
        self._cce_sharder = ebc_sharder or CCEEmbeddingBagCollectionSharder(
            None, qcomm_codecs_registry
        )

    def shard(
        self,
        module: FeatureProcessedEmbeddingBagCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> ShardedFeatureProcessedEmbeddingBagCollection:
        """The sharded form of `module` under the plan `params` of its logical tables."""
        if not isinstance(processed_collection(module), CCEEmbeddingBagCollection):
            return super().shard(module, params, env, device, module_fqn)
        by_rows = [name for name, sharding in params.items() if is_row_wise(sharding)]
        if by_rows:
            raise ValueError(
                f"tables {by_rows}: feature processors weigh ids where they are looked up, and "
                "those of ROW_WISE tables arrive there as rows; plan them table-wise or column-wise"
            )
        device = device if device is not None else torch.device("cpu")
        sharded = ShardedFeatureProcessedCCE(
            module, params, self._cce_sharder, env, device, module_fqn
        )
        # Or it would refuse the features that users give, which have no weights yet.
        processed_collection(sharded).checked.inputs.needs_weights = False
        return sharded

    def shardable_parameters(
        self, module: FeatureProcessedEmbeddingBagCollection
    ) -> dict[str, nn.Parameter]:
        """One parameter per logical table."""
        if not isinstance(processed_collection(module), CCEEmbeddingBagCollection):
            return super().shardable_parameters(module)
        return self._cce_sharder.shardable_parameters(processed_collection(module))
