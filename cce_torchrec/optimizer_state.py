"""What optimizers keep of a table: names, shapes, and what a clustering step makes of each."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch

_STATE_BYTES = 4
"""FBGEMM keeps state in float32 by default, whatever the type of the weights."""


class Extent(Enum):
    """How many numbers a state tensor has."""

    TABLE = "one"
    ROW = "one for each row"
    WEIGHT = "one for each weight"


@dataclass(frozen=True, kw_only=True)
class Reset:
    """What a clustering step makes of a state tensor of the chunk whose rows it replaces."""

    main_is_mean: bool
    """Whether a main row gets the mean over the ids of its cluster, of their old rows; else 0."""
    helper_share: float
    """Share of the old helper's mean that every row of the fresh helper starts from."""


_FIRST_MOMENT = Reset(main_is_mean=False, helper_share=0.0)
# An average forgets by itself, so all of it may stay; and a small one beside a step count that
# goes on would make Adam take steps of several times lr.
_SECOND_MOMENT = Reset(main_is_mean=True, helper_share=1.0)
# An accumulator does not forget. Measured (docs/results.md): from zero, the first steps after a
# clustering have the size of the learning rate and undo part of what it won; from all of it, the
# fresh helper learns too slowly.
_ACCUMULATOR = Reset(main_is_mean=True, helper_share=0.1)


@dataclass(frozen=True, kw_only=True)
class StateTensor:
    """One tensor that an optimizer keeps of a table."""

    name: str
    """torch's name of it, under which checkpoints have it."""
    fused: tuple[str, ...] = ()
    """TorchRec's names of it in the state dict of fused optimizers; empty if these keep none."""
    extent: Extent = Extent.WEIGHT
    reset: Reset = _ACCUMULATOR
    needed: bool = True
    """Whether state that comes without it is of no use to the optimizer."""


@dataclass(frozen=True, kw_only=True)
class OptimizerKind:
    """An optimizer of torch, TorchRec and FBGEMM; one that is not in `KINDS` is but a name."""

    name: str
    """Of torch's or TorchRec's class, by which checkpoints name it."""
    fbgemm: tuple[str, ...] = ()
    """What FBGEMM calls its fused forms."""
    tensors: tuple[StateTensor, ...] = ()

    def tensor(self, name: str) -> StateTensor:
        """The state tensor that torch calls `name`, an accumulator if this kind has no such one."""
        return next((t for t in self.tensors if t.name == name), StateTensor(name=name))

    def torch_name(self, fused: str) -> str:
        """torch's name of what TorchRec's fused optimizers call `fused`; the same if unknown."""
        return next((t.name for t in self.tensors if fused in t.fused), fused)

    def fused_bytes(self, *, rows: int, width: int, chunk_dim: int) -> int:
        """Bytes that FBGEMM keeps of a shard [rows, width] whose tables are `chunk_dim` wide."""
        weights = _STATE_BYTES * rows * width
        # A chunk is a table of its own in FBGEMM, with one number a row in each.
        by_extent = {
            Extent.TABLE: 0,
            Extent.ROW: -(-weights // chunk_dim) if width else 0,
            Extent.WEIGHT: weights,
        }
        return sum(by_extent[t.extent] for t in self.tensors if t.fused)

    def as_saved(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """The state tensor `name` in the shape of FBGEMM and of checkpoints."""
        return value.view(-1) if self._has_columns(name) and value.ndim == 2 else value

    def as_kept(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """What `as_saved` gave, in the shape in which torch's optimizer keeps it."""
        return value.view(-1, 1) if self._has_columns(name) and value.ndim == 1 else value

    def _has_columns(self, name: str) -> bool:
        # TorchRec's RowWiseAdagrad keeps [rows, 1], FBGEMM's [rows].
        return self.tensor(name).extent is Extent.ROW


# Adagrad's step count enters an update only where the learning rate decays, and FBGEMM's fused
# forms, which know no such decay, keep none: state moves between the two without it.
_UNUSED_STEP = StateTensor(name="step", extent=Extent.TABLE, needed=False)
# TorchRec calls the first state of any fused optimizer momentum1, and others by FBGEMM's name,
# which is torch's.
_EXP_AVG = StateTensor(name="exp_avg", fused=("momentum1",), reset=_FIRST_MOMENT)
_EXP_AVG_SQ = StateTensor(name="exp_avg_sq", fused=("exp_avg_sq",), reset=_SECOND_MOMENT)

KINDS = (
    OptimizerKind(
        name="RowWiseAdagrad",
        fbgemm=("exact_row_wise_adagrad", "row_wise_adagrad"),
        tensors=(StateTensor(name="sum", fused=("momentum1",), extent=Extent.ROW), _UNUSED_STEP),
    ),
    OptimizerKind(
        name="Adagrad",
        fbgemm=("exact_adagrad",),
        tensors=(StateTensor(name="sum", fused=("momentum1",)), _UNUSED_STEP),
    ),
    OptimizerKind(
        name="SGD",
        fbgemm=("exact_sgd", "sgd"),
        # Only torch's form knows momentum.
        tensors=(StateTensor(name="momentum_buffer", reset=_FIRST_MOMENT),),
    ),
    OptimizerKind(
        name="Adam",
        fbgemm=("adam",),
        tensors=(
            _EXP_AVG,
            _EXP_AVG_SQ,
            StateTensor(name="max_exp_avg_sq", reset=_SECOND_MOMENT),  # torch's form, with amsgrad
            # The correction of the bias needs it. A fused kernel has one for all of its tables.
            StateTensor(name="step", fused=("iter",), extent=Extent.TABLE),
        ),
    ),
    # Without FBGEMM's name: checkpoints have its state under FBGEMM's names, as there is no other
    # form of it to which state could move.
    OptimizerKind(
        name="PartialRowWiseAdam",
        tensors=(_EXP_AVG, replace(_EXP_AVG_SQ, extent=Extent.ROW)),
    ),
)
_BY_NAME = {name: kind for kind in KINDS for name in (kind.name, *kind.fbgemm)}
_RESETS = {tensor.name: tensor.reset for kind in KINDS for tensor in kind.tensors}
_RESETS["momentum"] = _FIRST_MOMENT  # of optimizers of other libraries; torch has none so called


def kind_of(name: str) -> OptimizerKind:
    """The optimizer whose class, or whose form in FBGEMM, is called `name`."""
    return _BY_NAME.get(name, OptimizerKind(name=name))


def reset_of(name: str) -> Reset:
    """What a clustering step makes of the state tensor `name`, of any optimizer.

    One that is not in the table is treated as an accumulator.
    """
    return _RESETS.get(name, _ACCUMULATOR)


def state_of(parameter: torch.Tensor, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """What `optimizer` keeps of `parameter`, by torch's names; tensors only, live."""
    found = optimizer.state.get(parameter, {})
    return {key: value for key, value in found.items() if isinstance(value, torch.Tensor)}


def is_fused(kernel: Any) -> bool:
    """Whether TorchRec's `kernel` steps its tables itself; those of data-parallel tables do not."""
    return hasattr(kernel, "get_optimizer_state")


def fused_state(kernel: Any, num_tables: int) -> list[dict[str, torch.Tensor]]:
    """What `kernel` keeps of each of its tables, by torch's names; live, empty if it is nothing."""
    states = kernel.get_optimizer_state() if is_fused(kernel) else []
    return states or [{} for _ in range(num_tables)]  # FBGEMM's SGD gives an empty list
