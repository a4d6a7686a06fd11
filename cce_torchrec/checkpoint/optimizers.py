"""Optimizer state by parameter, in one form for fused, in-backward and ordinary optimizers.

State lives in three homes: FBGEMM's fused kernels (sharded tables), optimizers in backward
(unsharded tables) and the user's own (data-parallel tables, the dense network). A checkpoint
names it by parameter and by torch's name of the state, so that it may move from one to another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torchrec.distributed import DistributedModelParallel
from torchrec.optim.fused import FusedOptimizer
from torchrec.optim.keyed import CombinedOptimizer
from torchrec.optim.warmup import WarmupOptimizer

from cce_torchrec.checkpoint.parameter_state import (
    FusedState,
    ParameterState,
    State,
    TorchState,
    WarmupState,
)
from cce_torchrec.checkpoint.tables import unwrapped
from cce_torchrec.optimizer_state import OptimizerKind, kind_of
from cce_torchrec.torchrec_internals import (
    averages_models,
    fused_kernels,
    is_optimizer_of,
    lookups_of,
    optimizers_in_backward,
    warmup_parameter,
    wrapped_optimizer,
)


def listed(given: Any, name: str, attribute: str) -> list[Any]:
    """`given` optimizers or schedulers as a list.

    Args:
        given: what a caller passed as the argument `name`.
        attribute: what each of them has.

    Raises:
        ValueError: it is one of them, or has something else in it.
    """
    if hasattr(given, attribute):
        raise ValueError(f"{name} is one {type(given).__name__}; give a list of it, [{name[:-1]}]")
    try:
        found = list(given)
    except TypeError as error:
        raise ValueError(f"{name} {given!r} are no list; give one, which may be empty") from error
    for place, one in enumerate(found):
        if not hasattr(one, attribute):
            raise ValueError(f"{name}[{place}] is a {type(one).__name__}, and no {name[:-1]}")
    return found


def optimizer_states(
    model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]
) -> dict[str, ParameterState]:
    """The optimizer state of every parameter that has an optimizer on this rank.

    Parameters that are not the model's own are named by their place, "optimizers[0].__warmup".

    Args:
        model: unsharded, or under DistributedModelParallel.
        optimizers: the ones that the user steps; TorchRec's combined ones may hold the fused.
    """
    out = _fused(model) if isinstance(model, DistributedModelParallel) else {}
    # By identity: optimizers know no names, and `==` of tensors compares their values.
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        for optimizer in optimizers_in_backward(parameter) if name not in out else ():
            for group in optimizer.param_groups:
                out[name] = TorchState.of(optimizer, parameter, group)
    for number, optimizer in enumerate(listed(optimizers, "optimizers", "param_groups")):
        place = f"optimizers[{number}]"
        for name, state in _ordinary(list(_parts(optimizer, place)), names):
            first = out.setdefault(name, state)
            if isinstance(state, TorchState) and state.is_beside(first):
                lost = [f"state of {name!r}, which another optimizer steps too"]
                out[f"{place}.{name}"] = ParameterState(kind=state.kind, unsaved_state=lost)
    return out


def _parts(optimizer: Any, place: str) -> Iterator[tuple[str, Any]]:
    """`optimizer` and all inside TorchRec's combined and wrapped ones, with their place."""
    yield place, optimizer
    if isinstance(optimizer, CombinedOptimizer):
        for key, inner in optimizer.optimizers:
            yield from _parts(inner, f"{place}.{key}" if key else place)
    inner = wrapped_optimizer(optimizer)
    if inner is not None:
        yield from _parts(inner, place)


def _ordinary(
    parts: list[tuple[str, Any]], names: dict[int, str]
) -> Iterator[tuple[str, ParameterState]]:
    """State of parameters that are stepped by torch's optimizers among `parts`."""
    known = set(names)
    for place, part in parts:
        if isinstance(part, FusedOptimizer):
            known |= {id(parameter) for parameter in part.params.values()}
        elif isinstance(part, WarmupOptimizer):
            parameter = warmup_parameter(part)
            known.add(id(parameter))
            name = next(n for n, p in part.params.items() if p is parameter)
            yield f"{place}.{name}", WarmupState.of(part, parameter, {})
        elif averages_models(part) or isinstance(part, ZeroRedundancyOptimizer):
            lost = ["state beside that of its parameters, or on other ranks"]
            yield place, ParameterState(kind=_kind(part), unsaved_state=lost)
    for place, part in parts:
        # What wrappers and combined optimizers have is that of the ones inside them.
        outer = isinstance(part, CombinedOptimizer | FusedOptimizer | ZeroRedundancyOptimizer)
        if outer or wrapped_optimizer(part):
            continue
        for g, group in enumerate(part.param_groups):
            for i, parameter in enumerate(group["params"]):
                name = names.get(id(parameter), f"{place}.param_groups[{g}].params[{i}]")
                known.add(id(parameter))
                yield name, TorchState.of(part, parameter, group)
        lost = _lost(part, known)
        if lost:
            yield f"{place}.state", ParameterState(kind=_kind(part), unsaved_state=lost)


def _lost(optimizer: torch.optim.Optimizer, known: set[int]) -> list[str]:
    """What `optimizer` keeps of none of the tensors `known`, by their ids (Python's)."""
    lost = [f"state of {_called(key)}" for key in optimizer.state if id(key) not in known]
    if lost or type(optimizer).state_dict is torch.optim.Optimizer.state_dict:
        return lost
    # As PostLocalSGDOptimizer the number of its steps; torch's own have nothing beside.
    return [repr(key) for key in sorted(optimizer.state_dict().keys() - {"state", "param_groups"})]


def _kind(optimizer: Any) -> OptimizerKind:
    return kind_of(type(optimizer).__name__)


def _called(key: Any) -> str:
    """A key of an optimizer's state that is no parameter of its groups."""
    return f"a tensor {list(key.shape)}" if isinstance(key, torch.Tensor) else repr(key)


def _fused(model: DistributedModelParallel) -> dict[str, ParameterState]:
    """State of the tables in FBGEMM's fused kernels on this rank."""
    kernels = _kernels(model)
    parts = [part for _, part in _parts(model.fused_optimizer, "")]
    # TorchRec's names and ShardedTensors: torch.distributed.checkpoint needs to know which part of
    # a table each rank has, of which FBGEMM's own get_optimizer_state() says nothing.
    states = model.fused_optimizer.state_dict()["state"]
    out: dict[str, ParameterState] = {}
    for name, state in states.items():
        table = name.removesuffix(".weight").rpartition(".")[2]
        kernel = next((k for path, t, k in kernels if t == table and name.startswith(path)), None)
        if kernel is None:
            continue
        kind = kind_of(str(kernel.optimizer))
        tensors: State = {
            kind.torch_name(key.rpartition(".")[2]): value for key, value in state.items()
        }
        for counter in kind.tensor("step").fused:  # it is no part of TorchRec's state dict
            if hasattr(kernel, counter):
                tensors["step"] = getattr(kernel, counter).view(())
        own = [part for part in parts if is_optimizer_of(part, kernel)]
        groups = [group for part in own for group in part.param_groups]
        out[name] = FusedState.of(kind, tensors, kernel, groups)
    return out


def _kernels(model: nn.Module) -> list[tuple[str, str, Any]]:
    """(path of the collection, table, fused kernel) of the tables on this rank."""
    out = []
    for path, module in unwrapped(model).named_modules():
        for tables, kernel in fused_kernels(lookups_of(module)):
            if hasattr(kernel, "optimizer"):
                out += [(f"{path}." if path else "", table.name, kernel) for table in tables]
    return out
