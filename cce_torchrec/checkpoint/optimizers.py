"""Optimizer state by parameter, in one form for fused, in-backward and ordinary optimizers.

State lives in three homes: FBGEMM's fused kernels (sharded tables), optimizers in backward
(unsharded tables) and the user's own (data-parallel tables, the dense network). A checkpoint
names it by parameter and by torch's name of the state, so that it may move from one to another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn
from torchrec.distributed import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer

from cce_torchrec.checkpoint.manifest import NO_OPTIMIZER, OptimizerRecord
from cce_torchrec.checkpoint.tables import unwrapped
from cce_torchrec.optimizer_state import OptimizerKind, kind_of, state_of
from cce_torchrec.torchrec_internals import (
    ShardedTensor,
    fused_kernels,
    is_optimizer_of,
    lookups_of,
    optimizers_in_backward,
    wrapped_optimizer,
)

State = dict[str, "torch.Tensor | ShardedTensor"]


@dataclass(kw_only=True)
class ParameterState:
    """The optimizer of one parameter on this rank: live tensors, and settings such as lr.

    In this form a parameter that has none.
    """

    creates_tensors: ClassVar[bool] = False
    """Whether the optimizer takes tensors that it has not made yet."""
    kind: OptimizerKind = field(default_factory=lambda: OptimizerKind(name=NO_OPTIMIZER.kind))
    tensors: State = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def record(self) -> OptimizerRecord:
        """What the manifest keeps of it."""
        shapes = {key: list(value.size()) for key, value in self.tensors.items()}
        return OptimizerRecord(kind=self.kind.name, settings=self.settings, state=shapes)

    def create(self, key: str, value: torch.Tensor) -> None:
        """Puts a state tensor that the optimizer has not made yet."""

    def restore(self, settings: dict[str, Any]) -> None:
        """Takes settings over."""


@dataclass(kw_only=True)
class _TorchState(ParameterState):
    """Under an optimizer of torch, which the user steps or the backward."""

    creates_tensors: ClassVar[bool] = True  # torch makes them at the first step
    optimizer: torch.optim.Optimizer
    parameter: torch.Tensor
    group: dict[str, Any]

    def create(self, key: str, value: torch.Tensor) -> None:
        """Puts it where the first step would."""
        self.optimizer.state[self.parameter][key] = self.kind.as_kept(key, value)

    def restore(self, settings: dict[str, Any]) -> None:
        """Takes over what the group of the parameter has too."""
        for key, value in settings.items():
            if isinstance(self.group.get(key), torch.Tensor):
                self.group[key].fill_(value)
            elif key in self.group:
                # JSON has no tuples, and Adam's betas are one.
                self.group[key] = tuple(value) if isinstance(value, list) else value


@dataclass(kw_only=True)
class _FusedState(ParameterState):
    """In one of FBGEMM's kernels."""

    kernel: Any
    fused_optimizer: CombinedOptimizer

    def restore(self, settings: dict[str, Any]) -> None:
        """Takes over the learning rate, into the kernel and TorchRec's optimizer around it."""
        self.kernel.set_learning_rate(settings["lr"])
        if hasattr(self.kernel, "iter_cpu"):
            self.kernel.iter_cpu.zero_()  # FBGEMM then reads it from `iter` anew
        # TorchRec's optimizer sets its own learning rate into the kernel at every step.
        for optimizer in _parts(self.fused_optimizer):
            if is_optimizer_of(optimizer, self.kernel):
                for group in optimizer.param_groups:
                    group["lr"] = settings["lr"]


def optimizer_states(
    model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]
) -> dict[str, ParameterState]:
    """The optimizer state of every parameter that has an optimizer on this rank.

    Args:
        model: unsharded, or under DistributedModelParallel.
        optimizers: the ones that the user steps; TorchRec's combined ones may hold the fused.
    """
    out = _fused(model) if isinstance(model, DistributedModelParallel) else {}
    # By identity: optimizers know no names, and `==` of tensors compares their values.
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
    kind = kind_of(type(optimizer).__name__)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) in names:
                state = state_of(parameter, optimizer)
                out[names[id(parameter)]] = _TorchState(
                    kind=kind,
                    tensors={key: kind.as_saved(key, value) for key, value in state.items()},
                    settings=_numbers(group),
                    optimizer=optimizer,
                    parameter=parameter,
                    group=group,
                )
    return out


def _fused(model: DistributedModelParallel) -> dict[str, ParameterState]:
    """State of the tables in FBGEMM's fused kernels on this rank."""
    kernels = _kernels(model)
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
        out[name] = _FusedState(
            kind=kind,
            tensors=tensors,
            settings={"lr": float(kernel.get_learning_rate())},
            kernel=kernel,
            fused_optimizer=model.fused_optimizer,
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


def dropped_state(saved: OptimizerRecord, state: ParameterState) -> str | None:
    """Why a parameter's optimizer state cannot be taken over; None if it can.

    Args:
        saved: what the checkpoint says of it.
        state: what the model has.
    """
    current = state.record()
    if saved.kind != current.kind:
        return f"saved with {saved.kind}, the model has {current.kind}"
    for key in sorted(set(saved.state) | set(current.state)):
        there, here = saved.state.get(key), current.state.get(key)
        if there == here or (here is None and state.creates_tensors):
            continue
        if state.kind.tensor(key).needed:
            return (
                f"{current.kind}'s {key!r} has shape {there} in the checkpoint, {here} in the model"
            )
    return None
