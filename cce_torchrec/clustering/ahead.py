"""A job's clustering steps before they come: what could only fail hours later is told at once."""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torchrec.distributed.utils import append_prefix

from cce_torchrec.clustering.choice import fixed_tables, is_wanted, left_alone
from cce_torchrec.clustering.collections import cce_collections
from cce_torchrec.clustering.local_chunks import local_chunks
from cce_torchrec.clustering.options import Options
from cce_torchrec.clustering.step import cluster
from cce_torchrec.collectives import ranks_of_call
from cce_torchrec.distributed.embedding_bag_collection import ShardedCCEEmbeddingBagCollection
from cce_torchrec.kmeans.backends import make_backend
from cce_torchrec.table import physical_table
from cce_torchrec.torchrec_internals import optimizers_in_backward

# Which recipes are due the schedule says.
_ARGUMENTS = [p for p in inspect.signature(cluster).parameters if p not in ("model", "recipes")]


def optimizer_of_tables(
    model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]
) -> torch.optim.Optimizer | None:
    """The one of a job's `optimizers` that `cluster` is to be given; None where there are none.

    It has the state of unsharded and data-parallel tables. If none has them it is the first, which
    a clustering refuses where it needs one.

    Raises:
        ValueError: several have some of them, naming the tables of each.
    """
    weights = dict(_stepped_by_the_job(model))
    found = {}
    for place, optimizer in enumerate(optimizers):
        # By identity, as `==` of tensors compares their values.
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        tables = [path for path, of_table in weights.items() if own & set(map(id, of_table))]
        if tables:
            found[place] = tables
    if len(found) > 1:
        held = ", ".join(f"optimizers[{place}] those of {own}" for place, own in found.items())
        raise ValueError(
            f"several optimizers have parameters of tables that are unsharded or data-parallel, "
            f"{held}, and the state of one alone follows a clustering; join them by TorchRec's "
            "CombinedOptimizer, or give the one as clustering={'optimizer': ...}"
        )
    return optimizers[next(iter(found), 0)] if optimizers else None


def _stepped_by_the_job(model: nn.Module) -> Iterator[tuple[str, list[nn.Parameter]]]:
    """Path and parameters of each CCE table that neither kernels nor the backward pass step."""
    for path, module in cce_collections(model):
        sharded = isinstance(module, ShardedCCEEmbeddingBagCollection)
        for config in (table.cce for table in module.tables if table.cce is not None):
            if (
                isinstance(module, ShardedCCEEmbeddingBagCollection)
                and config.name not in module.data_parallel
            ):
                continue
            names = [physical_table(config.name, chunk) for chunk in range(config.num_chunks)]
            inside = "embedding_bag_collection.embedding_bags"
            weights = [module.get_parameter(f"{inside}.{name}.weight") for name in names]
            yield (
                append_prefix(path, config.name),
                [weight for weight in weights if sharded or not optimizers_in_backward(weight)],
            )


def check_ahead(model: nn.Module, arguments: Mapping[str, Any], *, finalize: bool) -> Hashable:
    """Looks at what `cluster(model, **arguments)` will be given, as far as it can be known before.

    Args:
        model: as it is trained.
        arguments: of `cluster`, by name.
        finalize: whether the last clustering finalizes.

    Returns:
        What every rank must have chosen alike.

    Raises:
        ValueError: whatever a clustering would raise of its arguments: unknown ones, such as do not
            suit the tables, an optimizer that lacks a table, or no CCE table.
    """
    unknown = sorted(set(arguments) - set(_ARGUMENTS))
    if unknown:
        raise ValueError(f"a clustering has no argument {unknown[0]!r} here; it takes {_ARGUMENTS}")
    # With the end in mind: "main" clusters well, and cannot finalize.
    options = _options(arguments, finalize)
    try:
        options.check()
    except TypeError as error:
        given = {name: arguments[name] for name in sorted(arguments) if name != "optimizer"}
        raise ValueError(f"cluster cannot take {given}: {error}") from error
    fixed = fixed_tables(model)
    # Otherwise nothing is known before training of which tables will be left alone.
    if not fixed or options.tables is not None:
        left_alone(fixed, [], [], options.tables)
    wanted = [path for path, why in fixed.items() if not why and is_wanted(path, options.tables)]
    options.check_names({path.rpartition(".")[2] for path in wanted})
    group = ranks_of_call(arguments.get("process_group"))
    for _, state in local_chunks(model, arguments.get("optimizer"), options):
        # Not `check_for`: weights that are not finite may be those of before a load.
        state.check_group(group)
        options.check_arguments(state)
        make_backend(options.scorer, state.weight.device)
    return options.fingerprint()


def has_helpers(model: nn.Module, arguments: Mapping[str, Any]) -> bool:
    """Whether this rank has a chunk that `finalize(model, **arguments)` would finalize."""
    options = _options(arguments, finalize=True)
    chunks = local_chunks(model, arguments.get("optimizer"), options)
    return any(not state.frozen for _, state in chunks)


def _options(arguments: Mapping[str, Any], finalize: bool) -> Options:
    own = {k: v for k, v in arguments.items() if k not in ("optimizer", "process_group")}
    return Options(**own, finalize=finalize)
