"""All sharders that a model with CCE tables needs."""

from __future__ import annotations

from typing import Any

from torchrec.distributed.sharding_plan import get_default_sharders as torchrec_sharders
from torchrec.distributed.types import QuantizedCommCodecs

from cce_torchrec.distributed.embedding_bag_sharder import CCEEmbeddingBagCollectionSharder
from cce_torchrec.distributed.embedding_collection import CCEEmbeddingCollectionSharder
from cce_torchrec.distributed.feature_processed import FeatureProcessedSharder


def get_default_sharders(
    fused_params: dict[str, Any] | None = None,
    qcomm_codecs_registry: dict[str, QuantizedCommCodecs] | None = None,
) -> list[Any]:
    """TorchRec's default sharders, and ours for CCE collections."""
    bags = CCEEmbeddingBagCollectionSharder(fused_params, qcomm_codecs_registry)
    ours: list[Any] = [
        bags,
        CCEEmbeddingCollectionSharder(fused_params, qcomm_codecs_registry),
        FeatureProcessedSharder(bags, qcomm_codecs_registry),
    ]
    taken = {sharder.module_type for sharder in ours}
    return [*ours, *(s for s in torchrec_sharders() if s.module_type not in taken)]
