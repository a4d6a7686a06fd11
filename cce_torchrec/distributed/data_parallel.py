"""CCE tables that are whole on every rank, and the parameters that their optimizer trains."""

from __future__ import annotations

import logging

from torch import nn

from cce_torchrec.distributed.embedding_bag_collection import ShardedCCEEmbeddingBagCollection
from cce_torchrec.modules.embedding_bag_collection import physical_configs

logger = logging.getLogger(__name__)


def data_parallel_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Weights of all data-parallel tables in the CCE collections of `model`, by name.

    Without those of frozen tables, which no optimizer is to have.

    TorchRec's in-backward optimizers do not reach data-parallel tables. Give these parameters an
    optimizer of their own, apart from the dense network's, and hand it to `cluster`:

        tables = data_parallel_parameters(model)
        sparse = KeyedOptimizerWrapper(tables, lambda p: torch.optim.Adagrad(p, lr=0.03))
        optimizer = CombinedOptimizer([model.fused_optimizer, ("tables", sparse), ("dense", ...)])
        cluster(model, optimizer=optimizer)
    """
    out: dict[str, nn.Parameter] = {}
    for path, module in model.named_modules():
        if not isinstance(module, ShardedCCEEmbeddingBagCollection):
            continue
        for config in module.embedding_bag_configs():
            if config.name in module.data_parallel - module.frozen:
                for physical in physical_configs(config, module.is_weighted()):
                    name = f"embedding_bag_collection.embedding_bags.{physical.name}.weight"
                    out[f"{path}.{name}" if path else name] = module.get_parameter(name)
    if not out:
        logger.warning(
            "no CCE collection has a data-parallel table to train; name tables in "
            "make_plan(data_parallel=...), and call this once the model is sharded"
        )
    return out
