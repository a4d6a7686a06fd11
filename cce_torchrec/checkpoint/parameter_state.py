"""The optimizer of one parameter as checkpoints have it, in whichever of its homes it lives."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from cce_torchrec.checkpoint.manifest import NO_OPTIMIZER, OptimizerRecord
from cce_torchrec.optimizer_state import OptimizerKind, kind_of
from cce_torchrec.torchrec_internals import ShardedTensor

State = dict[str, "torch.Tensor | ShardedTensor"]

_KERNEL_RATE = "kernel_lr"
"""The rate that FBGEMM's kernel trains at; that of its group waits for the next `step`."""
_KERNEL_STEPS = "kernel_iter"
_RATES = ("lr", _KERNEL_RATE, "initial_lr", "max_lr", "min_lr")
_OF_SCHEDULERS = ("initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum")
"""What torch's schedulers add to a group, so that the group of a fresh optimizer lacks it."""
_NAMES = ("params", "param_names")
"""The keys of a group that say whose it is."""


@dataclass(kw_only=True)
class ParameterState:
    """The optimizer of one parameter on this rank: live tensors, numbers, and settings such as lr.

    In this form a parameter that has none.
    """

    creates_tensors: ClassVar[bool] = False
    """Whether the optimizer takes tensors that it has not made yet: `unmade` and `create`."""
    is_schedule: ClassVar[bool] = False
    """Whether it says how far a schedule of learning rates is, and nothing else."""
    kind: OptimizerKind = field(default_factory=lambda: OptimizerKind(name=NO_OPTIMIZER.kind))
    tensors: State = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    """State that is no tensor: numbers, flags."""
    settings: dict[str, Any] = field(default_factory=dict)
    groups: list[dict[str, Any]] = field(default_factory=list)
    """The optimizer's groups, which settings are restored into."""
    unsaved_state: list[str] = field(default_factory=list)
    """Names and types of state that JSON and tensors cannot hold."""
    unsaved_settings: list[str] = field(default_factory=list)

    def record(self) -> OptimizerRecord:
        """What the manifest keeps of it."""
        types = {key: str(value.dtype)[len("torch.") :] for key, value in self.tensors.items()}
        return OptimizerRecord(
            kind=self.kind.name,
            settings=self.settings,
            state={key: list(value.size()) for key, value in self.tensors.items()},
            dtypes={key: name for key, name in types.items() if name != "float32"},
            values=self.values,
            unsaved_state=self.unsaved_state,
            unsaved_settings=self.unsaved_settings,
        )

    def unmade(self, record: OptimizerRecord) -> State:
        """Empty tensors for the state in `record` that the optimizer has not made yet."""
        return {}

    def create(self, made: State) -> None:
        """Puts what `unmade` gave, once it was filled."""

    def restore(self, record: OptimizerRecord, rates: bool) -> None:
        """Takes over the settings and numbers of `record`, learning rates only if `rates`."""


@dataclass(kw_only=True)
class TorchState(ParameterState):
    """Under an optimizer of torch, which the user steps or the backward."""

    creates_tensors: ClassVar[bool] = True  # torch makes them at the first step
    optimizer: torch.optim.Optimizer
    parameter: torch.Tensor

    @classmethod
    def of(
        cls, optimizer: torch.optim.Optimizer, parameter: torch.Tensor, group: dict[str, Any]
    ) -> TorchState:
        """What `optimizer` keeps of `parameter`, which is in its `group`."""
        kind = kind_of(type(optimizer).__name__)
        found = optimizer.state.get(parameter, {})
        tensors = {key: value for key, value in found.items() if isinstance(value, torch.Tensor)}
        rest = {key: value for key, value in found.items() if key not in tensors}
        values, unsaved_state = _as_json(rest)
        settings, unsaved_settings = _as_json(group)
        return cls(
            kind=kind,
            tensors={key: kind.as_saved(key, value) for key, value in tensors.items()},
            values=values,
            settings=settings,
            unsaved_state=unsaved_state,
            unsaved_settings=unsaved_settings,
            optimizer=optimizer,
            parameter=parameter,
            groups=[group],
        )

    def unmade(self, record: OptimizerRecord) -> State:
        """Zeros; on the CPU where the optimizer counts its steps there."""
        # The rule of torch's own load_state_dict, by the flags that the optimizer will have.
        flags = {**self.groups[0], **record.settings}
        steps_on_gpu = flags.get("capturable") or flags.get("fused")
        out: State = {}
        for key in record.state.keys() - self.tensors.keys():
            on_cpu = key == "step" and not steps_on_gpu
            dtype = getattr(torch, record.dtypes.get(key, "float32"))
            device = torch.device("cpu") if on_cpu else self.parameter.device
            # Of a table that grew, the checkpoint fills the old rows alone.
            out[key] = torch.zeros(record.state[key], dtype=dtype, device=device)
        return out

    def create(self, made: State) -> None:
        """Puts it where the first step would."""
        for key, value in made.items():
            self._state()[key] = self.kind.as_kept(key, value)

    def restore(self, record: OptimizerRecord, rates: bool) -> None:
        """Takes over what the group of the parameter has too, or what schedulers add to it."""
        _set_group(self.groups[0], record.settings, rates)
        if record.values:
            self._state().update(record.values)
        if not record.state and not record.values:
            # Saved before the first step: what later steps have left is not of that run.
            self.optimizer.state.pop(self.parameter, None)

    def is_beside(self, first: ParameterState) -> bool:
        """Whether it has state that is not in `first`, of the same parameter."""
        own = isinstance(first, TorchState) and first.optimizer is self.optimizer
        return not own and bool(self.tensors or self.values or self.unsaved_state)

    def _state(self) -> dict[str, Any]:
        # TorchRec's wrappers around combined optimizers have plain dictionaries, without defaults.
        return self.optimizer.state.setdefault(self.parameter, {})


@dataclass(kw_only=True)
class WarmupState(TorchState):
    """How far TorchRec's WarmupOptimizer is, which it keeps of a parameter of no model."""

    is_schedule: ClassVar[bool] = True


@dataclass(kw_only=True)
class FusedState(ParameterState):
    """In one of FBGEMM's kernels."""

    kernel: Any

    @classmethod
    def of(
        cls, kind: OptimizerKind, tensors: State, kernel: Any, groups: list[dict[str, Any]]
    ) -> FusedState:
        """What `kernel` keeps of a table as `tensors`, and its settings as torch names them."""
        arguments = kernel.optimizer_args
        settings: dict[str, Any] = {"lr": float(kernel.get_learning_rate())}
        settings[_KERNEL_RATE] = settings["lr"]
        settings[_KERNEL_STEPS] = int(kernel.iter) if hasattr(kernel, "iter") else 0
        settings |= {"eps": arguments.eps, "weight_decay": arguments.weight_decay}
        settings["betas"] = [arguments.beta1, arguments.beta2]
        unsaved: list[str] = []
        for group in groups:
            found, unsaved = _as_json(group)
            settings |= found  # a rate that was set and not yet handed to the kernel, for one
        return cls(
            kind=kind,
            tensors=tensors,
            settings=settings,
            unsaved_settings=unsaved,
            kernel=kernel,
            groups=groups,
        )

    def restore(self, record: OptimizerRecord, rates: bool) -> None:
        """Takes settings over, into the kernel and TorchRec's optimizer around it."""
        settings = record.settings
        if rates:
            self.kernel.set_learning_rate(settings.get(_KERNEL_RATE, settings["lr"]))
        names: dict[str, Any] = {k: settings[k] for k in ("eps", "weight_decay") if k in settings}
        names |= dict(zip(("beta1", "beta2"), settings.get("betas", ()), strict=False))
        self.kernel.update_hyper_parameters(names)
        if _KERNEL_STEPS in settings and hasattr(self.kernel, "iter"):
            self.kernel.iter.fill_(settings[_KERNEL_STEPS])
        if hasattr(self.kernel, "iter_cpu"):
            self.kernel.iter_cpu.zero_()  # FBGEMM then reads it from `iter` anew
        for group in self.groups:
            _set_group(group, settings, rates)


def _of_group(group: dict[str, Any], settings: dict[str, Any], rates: bool) -> dict[str, Any]:
    """What of `settings` is set in `group`, learning rates only if `rates`."""
    return {
        key: value
        for key, value in settings.items()
        if (rates or key not in _RATES) and (key in group or key in _OF_SCHEDULERS)
    }


def joined_groups(
    restored: Iterable[tuple[str, OptimizerRecord, ParameterState]], rates: bool
) -> list[str]:
    """What the checkpoint has apart, and the model in one group, of which the last one counts.

    Args:
        restored: name, record and state of each parameter, in the order in which it is restored.
        rates: whether learning rates are.
    """
    told: dict[tuple[int, str], str] = {}
    first: dict[tuple[int, str], tuple[str, Any]] = {}
    for name, record, state in restored:
        for group in state.groups:
            for key, value in _of_group(group, record.settings, rates).items():
                other, before = first.setdefault((id(group), key), (name, value))
                if value != before:
                    told[id(group), key] = (
                        f"optimizer setting {key!r}: {other!r} was saved with {before} and "
                        f"{name!r} with {value}, and one group of the model's optimizer has both"
                    )
    return list(told.values())


def _set_group(group: dict[str, Any], settings: dict[str, Any], rates: bool) -> None:
    """Sets in `group` what `settings` have of it, learning rates only if `rates`."""
    for key, value in _of_group(group, settings, rates).items():
        if isinstance(group.get(key), torch.Tensor):
            group[key].fill_(value)  # captured graphs hold the tensor
        elif isinstance(value, list) and not isinstance(group.get(key), list):
            group[key] = tuple(value)  # JSON has no tuples, and Adam's betas are one
        else:
            group[key] = value


def _as_json(found: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """What of `found` JSON can hold, exactly; names and types of the rest."""
    out: dict[str, Any] = {}
    unsaved = []
    for key, value in found.items():
        if key in _NAMES:
            continue
        if isinstance(value, torch.Tensor) and value.numel() == 1:
            out[key] = value.item()
        elif _is_plain(value):
            out[key] = list(value) if isinstance(value, tuple) else value
        elif hasattr(value, "item") and not isinstance(value, torch.Tensor):
            out[key] = value.item()  # NumPy's numbers
        else:
            unsaved.append(f"{key!r} ({type(value).__name__})")
    return out, unsaved


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(one) for one in value)
    # Exactly these: NumPy's float64 is a float too, and an enumeration may be a str.
    return value is None or type(value) in (bool, int, float, str)


def dropped_state(saved: OptimizerRecord, state: ParameterState) -> str | None:
    """Why a parameter's optimizer state cannot be taken over; None if it can.

    Args:
        saved: what the checkpoint says of it.
        state: what the model has.
    """
    current = state.record()
    if saved.unsaved_state:
        # The rest alone is of no use: LBFGS would look for its old directions.
        return f"{saved.kind} keeps {', '.join(saved.unsaved_state)}, which checkpoints do not hold"
    if saved.kind != current.kind:
        return f"saved with {saved.kind}, the model has {current.kind}"
    if state.creates_tensors and not saved.state:
        return None
    for key in sorted(set(saved.state) | set(current.state)):
        there, here = saved.state.get(key), current.state.get(key)
        if there == here or (here is None and state.creates_tensors):
            continue
        if state.kind.tensor(key).needed:
            return (
                f"{current.kind}'s {key!r} has shape {there} in the checkpoint, {here} in the model"
            )
    return None
