"""Optimizer state by parameter, in one form for fused, in-backward and ordinary optimizers.

State lives in three homes: FBGEMM's fused kernels (sharded tables), optimizers in backward
(unsharded tables) and the user's own (data-parallel tables, the dense network). A checkpoint
names it by parameter and by torch's name of the state, so that it may move from one to another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torchrec.distributed import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer

from cce_torchrec.checkpoint.tables import unwrapped
from cce_torchrec.torchrec_internals import (
    ShardedTensor,
    fused_kernels,
    is_optimizer_of,
    lookups_of,
    optimizers_in_backward,
    wrapped_optimizer,
)

_KINDS = {
    "exact_row_wise_adagrad": "RowWiseAdagrad",
    "row_wise_adagrad": "RowWiseAdagrad",
    "exact_adagrad": "Adagrad",
    "exact_sgd": "SGD",
    "sgd": "SGD",
    "adam": "Adam",
}
_NAMES = {
    "RowWiseAdagrad": {"momentum1": "sum"},
    "Adagrad": {"momentum1": "sum"},
    "Adam": {"momentum1": "exp_avg", "momentum2": "exp_avg_sq"},
}
_STEPLESS = ("Adagrad", "RowWiseAdagrad")
"""Their step counts only where the learning rate decays; fused ones keep none."""

State = dict[str, "torch.Tensor | ShardedTensor"]


@dataclass
class ParameterState:
    """The optimizer of one parameter on this rank: live tensors, and settings such as lr."""

    kind: str
    tensors: State
    settings: dict[str, Any]
    restore: Callable[[dict[str, Any]], None]
    """Takes settings over."""
    create: Callable[[str, torch.Tensor], None] | None = None
    """Puts a state tensor that the optimizer has not made yet."""

    def describe(self) -> dict[str, Any]:
        """What the manifest keeps: kind, settings and the shapes of the state."""
        shapes = {key: list(value.size()) for key, value in self.tensors.items()}
        return {"kind": self.kind, "settings": self.settings, "state": shapes}


def optimizer_states(
    model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]
) -> dict[str, ParameterState]:
    """The optimizer state of every parameter that has an optimizer on this rank.

    Args:
        model: unsharded, or under DistributedModelParallel.
        optimizers: the ones that the user steps; TorchRec's combined ones may hold the fused.
    """
    out = _fused(model) if isinstance(model, DistributedModelParallel) else {}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        if name not in out and not isinstance(model, DistributedModelParallel):
            for optimizer in optimizers_in_backward(parameter):
                out |= _ordinary(optimizer, names)
    for optimizer in optimizers:
        for part in _parts(optimizer):
            out |= {n: s for n, s in _ordinary(part, names).items() if n not in out}
    return out


def _parts(optimizer: Any) -> list[Any]:
    """Optimizers inside TorchRec's combined and wrapped ones."""
    if isinstance(optimizer, CombinedOptimizer):
        return [part for _, inner in optimizer.optimizers for part in _parts(inner)]
    inner = wrapped_optimizer(optimizer)
    return [optimizer] if inner is None else _parts(inner)


def _ordinary(optimizer: Any, names: dict[int, str]) -> dict[str, ParameterState]:
    """State of a torch optimizer's parameters."""
    out: dict[str, ParameterState] = {}
    kind = type(optimizer).__name__
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names.get(id(parameter))
            if name is None:
                continue
            own = optimizer.state.get(parameter, {})
            tensors: State = {
                key: value.view(-1) if _is_rowwise(kind, value) else value
                for key, value in own.items()
                if isinstance(value, torch.Tensor)
            }
            out[name] = ParameterState(
                kind,
                tensors,
                _numbers(group),
                lambda settings, group=group: _restore(group, settings),  # type: ignore[misc]  # bound now
                lambda key, value, opt=optimizer, p=parameter, kind=kind: _create(  # type: ignore[misc]  # bound now
                    opt, p, kind, key, value
                ),
            )
    return out


def _is_rowwise(kind: str, value: torch.Tensor) -> bool:
    return kind == "RowWiseAdagrad" and value.ndim == 2


def _create(
    optimizer: Any, parameter: torch.Tensor, kind: str, key: str, value: torch.Tensor
) -> None:
    rowwise = kind == "RowWiseAdagrad" and value.ndim == 1
    optimizer.state[parameter][key] = value.view(-1, 1) if rowwise else value


def _fused(model: DistributedModelParallel) -> dict[str, ParameterState]:
    """State of the tables in FBGEMM's fused kernels on this rank."""
    kernels = _kernels(model)
    states = model.fused_optimizer.state_dict()["state"]
    out: dict[str, ParameterState] = {}
    for name, state in states.items():
        table = name.removesuffix(".weight").rpartition(".")[2]
        kernel = next((k for path, t, k in kernels if t == table and name.startswith(path)), None)
        if kernel is None:
            continue
        kind = _KINDS.get(str(kernel.optimizer), str(kernel.optimizer))
        tensors: State = {}
        for key, value in state.items():
            short = key.rpartition(".")[2]
            tensors[_NAMES.get(kind, {}).get(short, short)] = value
        if kind == "Adam" and hasattr(kernel, "iter"):
            tensors["step"] = kernel.iter.view(())
        out[name] = ParameterState(
            kind,
            tensors,
            {"lr": float(kernel.get_learning_rate())},
            lambda settings, kernel=kernel: _restore_fused(model, kernel, settings),  # type: ignore[misc]  # bound now
        )
    return out


def _kernels(model: nn.Module) -> list[tuple[str, str, Any]]:
    """(path of the collection, table, fused kernel) of the tables on this rank."""
    out = []
    for path, module in unwrapped(model).named_modules():
        for tables, kernel in fused_kernels(lookups_of(module)):
            if hasattr(kernel, "optimizer"):
                out += [(f"{path}." if path else "", table.name, kernel) for table in tables]
    return out


def _restore_fused(model: DistributedModelParallel, kernel: Any, settings: dict[str, Any]) -> None:
    kernel.set_learning_rate(settings["lr"])
    if hasattr(kernel, "iter_cpu"):
        kernel.iter_cpu.zero_()  # FBGEMM then reads it from `iter` anew
    for _, part in model.fused_optimizer.optimizers:
        for one in _parts(part):
            if is_optimizer_of(one, kernel):
                for group in one.param_groups:
                    group["lr"] = settings["lr"]


def _numbers(group: dict[str, Any]) -> dict[str, Any]:
    """Settings of a parameter group that are numbers."""
    out: dict[str, Any] = {}
    for key, value in group.items():
        if isinstance(value, torch.Tensor) and value.numel() == 1:
            out[key] = float(value)
        elif (isinstance(value, (int, float)) and not isinstance(value, bool)) or (
            isinstance(value, tuple) and all(isinstance(v, (int, float)) for v in value)
        ):
            out[key] = value
    return out


def _restore(group: dict[str, Any], settings: dict[str, Any]) -> None:
    for key, value in settings.items():
        if isinstance(group.get(key), torch.Tensor):
            group[key].fill_(value)
        elif key in group:
            group[key] = tuple(value) if isinstance(value, list) else value


def dropped_state(saved: dict[str, Any] | None, own: ParameterState | None) -> str | None:
    """Why a parameter's optimizer state cannot be taken over; None if it can.

    Args:
        saved: its description in the checkpoint, None where it had no optimizer.
        own: its state in the model.
    """
    before = saved["kind"] if saved else "no optimizer"
    now = own.kind if own else "no optimizer"
    if before != now:
        return f"saved with {before}, the model has {now}"
    if saved is None or own is None:
        return None
    shapes = own.describe()["state"]
    for key in sorted(set(saved["state"]) | set(shapes)):
        there, here = saved["state"].get(key), shapes.get(key)
        if there == here or (here is None and own.create is not None):
            continue
        if key == "step" and now in _STEPLESS:
            continue
        return f"{now}'s {key!r} has shape {there} in the checkpoint, {here} in the model"
    return None
