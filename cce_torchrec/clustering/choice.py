"""Which tables a clustering step takes, and why it leaves the others alone."""

from __future__ import annotations

import functools
import logging
from collections.abc import Collection, Iterable, Sequence

import torch
from torch import nn
from torchrec.distributed.utils import append_prefix

from cce_torchrec.clustering.collections import Collection as CCECollection
from cce_torchrec.clustering.collections import cce_collections
from cce_torchrec.config import CCEEmbeddingBagConfig
from cce_torchrec.distributed.embedding_bag_collection import ShardedCCEEmbeddingBagCollection
from cce_torchrec.recipe import TRAINED_BY
from cce_torchrec.table import called, logical_table, named, refuse_none
from cce_torchrec.torchrec_internals import fused_groups, lookups_of, optimizers_in_backward

logger = logging.getLogger(__name__)

_NO_GRADIENT = "frozen: its parameters require no gradient"
_NO_RATE = "frozen: its learning rate is 0 (a schedule may have ended there)"


def fixed_tables(model: nn.Module, *, finalize: bool = False) -> dict[str, str]:
    """Every CCE table by its path, and why it cannot be clustered, or finalized; or ""."""
    out = {}
    for path, module in cce_collections(model):
        for table in module.tables:
            if table.cce is not None:
                out[append_prefix(path, table.name)] = _why_fixed(table.cce, finalize)
    return out


def _why_fixed(config: CCEEmbeddingBagConfig, finalize: bool) -> str:
    # In the order in which a user would ask: what a table is, then what it has become.
    if not config.learned_codes:
        return "its codes are a hash (learned_codes=False)"
    if not config.helper_rows:
        return "it has no helper: it is finalized, or configured so"
    if finalize and not config.can_finalize:
        bits = config.finalized().code_bits
        return (
            f"its recipe is 'rare': codes of all its rows would have {bits} bits instead of "
            f"{config.code_bits}; it is served with its helper"
        )
    return ""


def other_recipes(model: nn.Module, recipes: Collection[str] | None) -> dict[str, str]:
    """By path, the CCE tables that only a step for other recipes than `recipes` clusters, and why.

    Those that no step clusters are none of them.
    """
    if recipes is None:
        return {}
    return {
        append_prefix(path, table.name): f"its recipe {table.cce.recipe!r} is not among recipes"
        for path, module in cce_collections(model)
        for table in module.tables
        if table.cce is not None
        and table.cce.recipe not in recipes
        and not _why_fixed(table.cce, False)
    }


def frozen_chunks(
    module: CCECollection,
    optimizer: torch.optim.Optimizer | None,
) -> dict[str, str]:
    """Why each physical table of `module` that is here and not trained is frozen.

    Args:
        module: a collection.
        optimizer: of unsharded and data-parallel tables, if there is one.
    """
    bags = module.embedding_bag_collection.embedding_bags.items()  # type: ignore[union-attr,operator]  # torch types it as a module
    if isinstance(module, ShardedCCEEmbeddingBagCollection):
        fixed = {name for name, _ in bags if logical_table(name) in module.frozen}
        rates = _fused_rates(module)
    else:
        fixed = {name for name, bag in bags if not bag.weight.requires_grad}
        rates = {name: _rates(optimizers_in_backward(bag.weight), bag.weight) for name, bag in bags}
    own = [] if optimizer is None else [optimizer]
    for name, bag in bags:
        rates.setdefault(name, []).extend(_rates(own, bag.weight))
    # Without any optimizer there is no rate, and the table may be trained by what we do not see.
    still = {name for name, found in rates.items() if found and not any(found)}
    return dict.fromkeys(still, _NO_RATE) | dict.fromkeys(fixed, _NO_GRADIENT)


def _rates(optimizers: Iterable[torch.optim.Optimizer], parameter: torch.Tensor) -> list[float]:
    """The learning rates of `parameter` in `optimizers`."""
    # A parameter may be in several groups, of several optimizers.
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    return [
        float(group["lr"])
        for group in groups
        if "lr" in group and any(one is parameter for one in group["params"])
    ]


def _fused_rates(module: ShardedCCEEmbeddingBagCollection) -> dict[str, list[float]]:
    """The rate that the next step of TorchRec's optimizers gives each table of this rank."""
    return {
        table.name: [float(group["lr"]) for group in groups]
        for tables, groups in fused_groups(lookups_of(module))
        for table in tables
    }


def is_wanted(path: str, tables: Collection[str] | None) -> bool:
    """Whether the table at `path` is one of `tables`; None is all."""
    return tables is None or any(called(path, name) for name in tables)


def left_alone(
    fixed: dict[str, str],
    frozen: Sequence[dict[str, str]],
    trained: Sequence[set[str]],
    tables: Collection[str] | None,
    others: dict[str, str] | None = None,
) -> dict[str, str]:
    """Why each table that the step does not take is left alone; the same on every rank.

    Args:
        fixed: `fixed_tables` of all ranks.
        frozen: by rank, the tables of which it found a chunk frozen, and why.
        trained: by rank, the tables of which it has a chunk that is trained.
        tables: those that the caller named, or None.
        others: `other_recipes` of all ranks.

    Raises:
        ValueError: no CCE table at all, chunks of a table of which some are frozen, or a name of
            no table or of one that cannot be clustered.
    """
    if not fixed:
        raise ValueError(
            "the model has no CCE table to cluster; its tables are made by "
            "CCEEmbeddingBagCollection, CCEEmbeddingCollection or compress_model"
        )
    # Of the table's form first, which all ranks know; then what each has found of its chunks.
    found = {path: why for path, why in fixed.items() if why}
    for rank, own in enumerate(frozen):
        for path, why in own.items():
            elsewhere = [r for r, paths in enumerate(trained) if path in paths]
            if elsewhere:
                raise ValueError(
                    f"table {path!r} is {why} on rank {rank}, and some of its chunks are trained "
                    f"on ranks {elsewhere}; freeze all of its chunks, on every rank, or none"
                )
            found[path] = why
    if tables is not None:
        chosen = named(tables, fixed, "tables")
        refused = [f"table {path!r}: {found[path]}" for path in sorted(chosen & set(found))]
        if refused:
            raise ValueError(f"{'; '.join(refused)}; it cannot be clustered, leave it out")
        found |= {path: "not among tables" for path in sorted(set(fixed) - chosen)}
    found = (others or {}) | found
    if len(found) == len(fixed):
        _say_once("; ".join(f"table {path!r}: {why}" for path, why in sorted(found.items())))
    return found


@functools.cache
def _say_once(tables: str) -> None:
    logger.warning("nothing was clustered, as every CCE table is left alone: %s", tables)


def check_recipes(recipes: Collection[str] | None) -> None:
    """Raises ValueError if `recipes` are none, or others than tables have."""
    if recipes is None:
        return
    if isinstance(recipes, str):
        raise ValueError(f"recipes={recipes!r} is one recipe; give a list, [{recipes!r}]")
    if not isinstance(recipes, Collection):
        raise ValueError(f"recipes={recipes!r} is no list or set; give one of {list(TRAINED_BY)}")
    if not recipes or set(recipes) - set(TRAINED_BY):
        raise ValueError(
            f"recipes {list(recipes)} have to be some of {list(TRAINED_BY)}, which tables are "
            "trained by; or leave it out"
        )


def check_names(names: Collection[str] | None) -> None:
    """Raises ValueError if `names` are none, or one, whose letters would be taken for names."""
    if isinstance(names, str):
        raise ValueError(f"tables={names!r} is one name; give a list, [{names!r}]")
    refuse_none(names)
