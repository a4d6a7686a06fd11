"""Sharded tables that are not to be trained; FBGEMM's kernels would step every table they hold.

A table is frozen by `requires_grad_(False)` on its parameters before it is sharded. TorchRec then
puts it into kernels of its own, and what comes out of these passes no gradient back to them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from cce_torchrec.modules.embedding_bag_collection import CCEEmbeddingBagCollection
from cce_torchrec.optimizer_state import is_fused
from cce_torchrec.table import Table, logical_table
from cce_torchrec.torchrec_internals import fused_kernels, keep_apart


def frozen_tables(module: CCEEmbeddingBagCollection) -> set[str]:
    """The tables of `module` whose parameters require no gradient.

    Raises:
        ValueError: a table of which some chunks are frozen and others are not.
    """
    required: dict[str, set[bool]] = {}
    for name, bag in module.embedding_bag_collection.embedding_bags.items():
        required.setdefault(logical_table(name), set()).add(bag.weight.requires_grad)
    partly = sorted(name for name, found in required.items() if len(found) > 1)
    if partly:
        raise ValueError(
            f"tables {partly}: some chunks require a gradient and others do not; call "
            "requires_grad_(False) on the parameters of all chunks of a table, or of none"
        )
    return {name for name, found in required.items() if found == {False}}


def keep_frozen_apart(module: CCEEmbeddingBagCollection, tables: set[str]) -> None:
    """Has TorchRec give the chunks of the frozen `tables` kernels of their own."""
    for name, bag in module.embedding_bag_collection.embedding_bags.items():
        if logical_table(name) in tables:
            keep_apart(bag.weight, "frozen")


def untrained_rows(lookups: Iterable[nn.Module], tables: Iterable[Table]) -> list[torch.Tensor]:
    """Views of the first rows of those chunks in `lookups` whose table does not train them."""
    rows = {name: count for table in tables for name, count in table.frozen_rows.items()}
    if not rows:
        return []
    return [
        weight[: rows[held.name]]
        for configs, kernel in fused_kernels(lookups)
        for held, weight in zip(configs, kernel.split_embedding_weights(), strict=True)
        if held.name in rows
    ]


def stop_training(lookups: Iterable[nn.Module], tables: set[str]) -> None:
    """No backward pass trains the chunks of the frozen `tables` in `lookups` from here on."""
    for held, kernel in fused_kernels(lookups):
        if not (held and all(logical_table(table.name) in tables for table in held)):
            continue
        if not is_fused(kernel):
            kernel.requires_grad_(False)  # or feature processors would learn by way of it
        kernel.register_forward_pre_hook(_at_rate_zero, with_kwargs=True)
        kernel.register_forward_hook(_without_gradient, with_kwargs=True)


def _passes_back(arguments: dict[str, Any]) -> bool:
    """Whether others learn by way of a lookup, which then has to keep its backward pass.

    Feature processors do, by the weights of samples; and kernels that fill one output in turn, as
    those on GPUs do for a batch size per feature.
    """
    weights = arguments.get("per_sample_weights")
    by_weights = weights is not None and weights.requires_grad
    return torch.is_grad_enabled() and (by_weights or arguments.get("vbe_output") is not None)


def _at_rate_zero(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    # At every lookup: TorchRec's optimizer hands a rate to each kernel, at every step.
    if _passes_back(kwargs) and is_fused(kernel):
        kernel.set_learning_rate(0.0)


def _without_gradient(
    kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor
) -> torch.Tensor:
    if _passes_back(kwargs):
        return output
    # It goes on to require a gradient: ranks exchange gradients in step, whatever is frozen where.
    return output.detach().requires_grad_(torch.is_grad_enabled())
