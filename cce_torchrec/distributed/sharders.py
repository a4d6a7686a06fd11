"""All sharders that a model with CCE tables needs."""

from __future__ import annotations

import functools
import sys
from types import ModuleType
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


@functools.wraps(torchrec_sharders)
def _torchrec_sharders_and_ours() -> list[Any]:
    return get_default_sharders()


def register_sharders() -> None:
    """Has TorchRec's own `get_default_sharders` return those of CCE collections as well.

    After it, all that takes a model without a list of sharders takes one with CCE collections too:
    `DistributedModelParallel`, `DMPCollection`, `shard`, `shard_modules` and planners, wherever
    they or `get_default_sharders` were imported before. Plain models are sharded as they were. It
    is for the process, on every rank; a second call changes nothing. Sharders with `fused_params`
    or quantised communication are still given by `sharders=get_default_sharders(...)`.
    """
    # TorchRec imports the function by name in four modules, and jobs do so in theirs.
    for module in list(sys.modules.values()):
        # Other things than modules may be in there, and this one keeps TorchRec's own.
        if isinstance(module, ModuleType) and module.__name__ != __name__:
            names = [name for name, value in vars(module).items() if value is torchrec_sharders]
            vars(module).update(dict.fromkeys(names, _torchrec_sharders_and_ours))
