"""What of a sharded collection's optimizers is not as it looks, said once when it is sharded."""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.distributed as dist
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.types import ParameterSharding

from cce_torchrec.distributed.plan import is_data_parallel
from cce_torchrec.modules.embedding_bag_collection import CCEEmbeddingBagCollection
from cce_torchrec.table import logical_table
from cce_torchrec.torchrec_internals import optimizers_in_backward, settings_in_backward

logger = logging.getLogger(__name__)

_IGNORED_ON_CPUS = ("weight_decay", "max_norm")


def warn_of_optimizers(
    module: CCEEmbeddingBagCollection,
    params: dict[str, ParameterSharding],
    fused_params: dict[str, Any],
    frozen: set[str],
    device: torch.device,
) -> None:
    """Names the tables whose optimizer is missing, or ignored in part or as a whole.

    Args:
        module: the unsharded collection.
        params: its part of the plan.
        fused_params: those of the sharder.
        frozen: tables that are not trained.
        device: of the tables.
    """
    replicated = {name for name, sharding in params.items() if is_data_parallel(sharding)}
    _warn_of_ignored(module, replicated - frozen)
    _warn_of_missing(module, params, fused_params, frozen)
    if device.type == "cpu":
        _warn_of_settings(module, fused_params, params.keys() - replicated - frozen)


def _warn_of_ignored(module: CCEEmbeddingBagCollection, tables: set[str]) -> None:
    """Says which data-parallel `tables` have an optimizer that TorchRec will not run."""
    bags = module.embedding_bag_collection.embedding_bags
    ignored = {
        logical_table(name) for name, bag in bags.items()
        if logical_table(name) in tables and optimizers_in_backward(bag.weight)
    }  # fmt: skip
    if ignored:
        logger.warning(
            "tables %s are data-parallel: TorchRec ignores their in-backward optimizer; train "
            "data_parallel_parameters(model) by one of their own",
            sorted(ignored),
        )


def _warn_of_missing(
    module: CCEEmbeddingBagCollection,
    params: dict[str, ParameterSharding],
    fused_params: dict[str, Any],
    frozen: set[str],
) -> None:
    """Says which tables no optimizer was applied to, and what trains them then.

    Not of data-parallel tables, which never have one of TorchRec's, nor of `frozen` ones.
    """
    without = {
        logical_table(name)
        for name, bag in module.embedding_bag_collection.embedding_bags.items()
        if not optimizers_in_backward(bag.weight)
    }
    without -= frozen | {name for name, sharding in params.items() if is_data_parallel(sharding)}
    dense = {t for t in without if params[t].compute_kernel == EmbeddingComputeKernel.DENSE.value}
    remedy = "call apply_optimizer_in_backward on their parameters before the plan is made"
    if dense and _speaks():
        logger.warning(
            "tables %s have no optimizer in backward: their backward pass trains nothing, and only "
            "an optimizer of yours over their parameters does; %s",
            sorted(dense),
            remedy,
        )
    if without - dense and "optimizer" not in fused_params and _speaks():
        logger.warning(
            "tables %s have no optimizer: FBGEMM's kernels train them by their default, SGD at a "
            "rate of 0.01; %s",
            sorted(without - dense),
            remedy,
        )


def _warn_of_settings(
    module: CCEEmbeddingBagCollection, fused_params: dict[str, Any], tables: set[str]
) -> None:
    """Says which settings of `tables` FBGEMM's fused optimizers on CPUs ignore (1.6 to 1.8)."""
    found: dict[str, set[str]] = {}
    for name, bag in module.embedding_bag_collection.embedding_bags.items():
        given = {**fused_params, **settings_in_backward(bag.weight)}
        for setting in _IGNORED_ON_CPUS:
            if given.get(setting) and logical_table(name) in tables:
                found.setdefault(f"{setting}={given[setting]}", set()).add(logical_table(name))
    for setting, ignored in found.items():
        if _speaks():
            logger.warning(
                "tables %s: FBGEMM's kernels on CPUs ignore %s; add a penalty to the loss instead",
                sorted(ignored),
                setting,
            )


def _speaks() -> bool:
    """Whether this rank says what all of them know."""
    return not dist.is_initialized() or dist.get_rank() == 0
