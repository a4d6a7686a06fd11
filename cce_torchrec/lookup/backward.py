"""FBGEMM's pooled lookup on a CPU with a backward made for codebooks (_backward.cpp).

FBGEMM sorts the rows of a batch, which pays where a table has many more rows than a batch reads. A
codebook has few, and a batch reads most of them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    SplitTableBatchedEmbeddingBagsCodegen,
    WeightDecayMode,
)

from cce_torchrec import compiled
from cce_torchrec.lookup import native
from cce_torchrec.spans import span
from cce_torchrec.torchrec_internals import become

MAX_BYTES = 4 << 20
"""float32 gradient of a table beyond which FBGEMM's backward is as fast: it leaves the caches."""
ROWS_PER_LOOKUP = 8
"""Rows of all tables to lookups of a batch, beyond which FBGEMM's backward is as fast."""
_FIELDS = 7
"""int64 of a `Table` in _backward.cpp."""
_INT64 = compiled.Pointer(torch.int64)
_FLOAT32 = compiled.Pointer(torch.float32)
_GRADIENT = compiled.Pointer(torch.float32, by_row=True)


def fits(rows: int, dim: int) -> bool:
    """Whether the gradient of a table is small enough."""
    return 4 * rows * dim <= MAX_BYTES


def takes(module: Any) -> bool:
    """Whether `CodebookBags` can be the class of this FBGEMM module.

    That is: float32 tables on a CPU, none with a gradient above `MAX_BYTES`, pooled by sum, read by
    int64 ids, and row-wise Adagrad without weight decay, clipping or maximal norm.
    """
    # Not of a subclass, which may have a forward of its own.
    if type(module) is not SplitTableBatchedEmbeddingBagsCodegen or not native.available():
        return False
    of = module.optimizer_args
    return (
        module.optimizer == EmbOptimType.EXACT_ROWWISE_ADAGRAD
        and module.weights_host.numel() > 0
        and module.weights_precision == SparseType.FP32
        and module.output_dtype == SparseType.FP32.as_int()
        and module.embedding_table_index_type == torch.int64
        and module.pooling_mode == PoolingMode.SUM
        and module.weight_decay_mode == WeightDecayMode.NONE
        and not (of.weight_decay or of.gradient_clipping or of.max_norm)
        and all(fits(rows, dim) for rows, dim, *_ in module.embedding_specs)
        # _backward.cpp takes the features of a table to follow one another.
        and list(module.feature_table_map) == sorted(module.feature_table_map)
    )


def take_over(module: Any) -> None:
    """Makes `module` a `CodebookBags`, if that can be; it is FBGEMM's own otherwise."""
    if takes(module):
        become(module, CodebookBags)
        module.num_rows = sum(rows for rows, *_ in module.embedding_specs)


@dataclass(frozen=True)
class _Tables:
    """The tables of a module as _backward.cpp reads them."""

    fields: ctypes.Array[ctypes.c_int64]
    scratch: torch.Tensor
    """Zeros, per thread."""
    values: int
    """Of the largest table."""
    rows: int
    """Of the longest table, rounded up."""

    @classmethod
    def describe(
        cls,
        weights: Sequence[torch.Tensor],
        states: Sequence[torch.Tensor],
        features: Sequence[int],
        threads: int,
    ) -> _Tables:
        """Of float32 weights [rows, dim], states [rows], and how many features read each table."""
        fields: list[int] = []
        feature, column = 0, 0
        for weight, state, own in zip(weights, states, features, strict=True):
            where = [_FLOAT32.address(weight), _FLOAT32.address(state)]
            fields += [*where, *weight.shape, own, feature, column]
            feature, column = feature + own, column + own * weight.shape[1]
        values = max(weight.numel() for weight in weights)
        rows = 32 * max(-(-len(weight) // 32) for weight in weights)
        # What a thread sums in is as large as the largest table, as any table may be its turn.
        shape = (threads, values + rows // 4 + rows)
        # Of four bytes and on the CPU, whatever a job has set as default.
        scratch = torch.zeros(shape, dtype=torch.float32, device="cpu")
        return cls((ctypes.c_int64 * len(fields))(*fields), scratch, values, rows)

    def step(
        self,
        batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
        grad: torch.Tensor,
        rate: float,
        eps: float,
    ) -> None:
        """Row-wise Adagrad on the rows of `batch`: indices, offsets, and weights or None."""
        if grad.stride(1) != 1:
            grad = grad.contiguous()
        indices, offsets, weights = batch
        lookups = (ctypes.c_int64 * 6)(
            _INT64.address(indices),
            _INT64.address(offsets),
            len(grad),
            0 if weights is None else _FLOAT32.address(weights),
            _GRADIENT.address(grad),
            grad.stride(0),
        )
        native.kernels().cce_rowwise_adagrad(
            self.fields,
            len(self.fields) // _FIELDS,
            lookups,
            rate,
            eps,
            self.scratch,
            self.values,
            self.rows,
            len(self.scratch),
        )


@compiled.operator(
    "rowwise_adagrad(Tensor(a!)[] weights, Tensor(b!)[] states, int[] features, Tensor grad, "
    "Tensor indices, Tensor offsets, Tensor? per_sample_weights, float rate, float eps) -> ()",
    fake=compiled.writes_only,
)
def _rowwise_adagrad(
    weights: list[torch.Tensor],
    states: list[torch.Tensor],
    features: list[int],
    grad: torch.Tensor,
    *rest: Any,
) -> None:
    indices, offsets, sample_weights, rate, eps = rest
    threads = min(torch.get_num_threads(), len(weights))
    tables = _Tables.describe(weights, states, features, threads)
    tables.step((indices, offsets, sample_weights), grad, rate, eps)


class CodebookBags(SplitTableBatchedEmbeddingBagsCodegen):
    """The same module with another backward; set as the `__class__` of one that `takes` allows.

    Lookup, weights, optimizer state and learning rate are the module's own. A batch size per
    feature, weights per sample that want a gradient, and batches of few lookups go FBGEMM's way.
    """

    num_rows: int
    """Of all tables."""
    _described: tuple[tuple[int, ...], _Tables]
    """What `_Tables` were made of: addresses of weights and state, number of threads."""

    def forward(
        self,
        indices: torch.Tensor,
        offsets: torch.Tensor,
        per_sample_weights: torch.Tensor | None = None,
        **others: Any,
    ) -> torch.Tensor:
        """Pooled rows, float32 [B, total_D], of `indices` [V] and `offsets` [features * B + 1]."""
        inputs = [t for t in (indices, offsets, per_sample_weights) if t is not None]
        types = [t.dtype for t in inputs]
        if (
            others
            or not torch.is_grad_enabled()
            or self.num_rows > ROWS_PER_LOOKUP * len(indices)
            or types != [torch.int64, torch.int64, torch.float32][: len(types)]
            or self.weights_host.dtype != torch.float32  # the module was converted
            or any(t.requires_grad for t in inputs)
        ):
            return super().forward(indices, offsets, per_sample_weights, **others)
        inputs = [t.contiguous() for t in inputs]
        return _Lookup.apply(self.placeholder_autograd_tensor, self, *inputs)

    def lookup(self, *inputs: torch.Tensor) -> torch.Tensor:
        """FBGEMM's forward alone."""
        return super().forward(*inputs)

    def update(
        self,
        grad: torch.Tensor,
        rate: float,
        eps: float,
        indices: torch.Tensor,
        offsets: torch.Tensor,
        weights: torch.Tensor | None = None,
    ) -> None:
        """A step of row-wise Adagrad on rows `indices`; `grad` [B, total_D] is of the output."""
        if native.is_traced(grad):
            _rowwise_adagrad(*self._state(), grad, indices, offsets, weights, rate, eps)
            return
        # Not the operator: it would describe the tables and make its scratch anew in every step.
        threads = min(torch.get_num_threads(), len(self.embedding_specs))
        key = (self.weights_host.data_ptr(), self.momentum1_host.data_ptr(), threads)
        # Taken out of the module for the time of a step: a step in another thread makes its own.
        known = self.__dict__.pop("_described", None)
        if known is None or known[0] != key:
            known = (key, _Tables.describe(*self._state(), threads))
        known[1].step((indices, offsets, weights), grad, rate, eps)
        self._described = known

    def _state(self) -> tuple[list[torch.Tensor], list[torch.Tensor], list[int]]:
        """Weights and state of each table, and the number of its features."""
        states = [state for state, *_ in self.split_optimizer_states()]
        features = [self.feature_table_map.count(t) for t in range(len(states))]
        return self.split_embedding_weights(), states, features


class _Lookup(torch.autograd.Function):
    """`CodebookBags.lookup`, and `update` as its backward."""

    @staticmethod
    def forward(
        ctx: Any, anchor: torch.Tensor, module: CodebookBags, *inputs: torch.Tensor
    ) -> torch.Tensor:
        """`anchor` wants a gradient, so that the output does."""
        ctx.module = module
        # As in FBGEMM the rates of a step are those at its lookup, not at its backward.
        ctx.rates = module.get_learning_rate(), module.optimizer_args.eps
        ctx.save_for_backward(*inputs)
        return module.lookup(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, ...]:
        """Trains; there is nothing to pass on."""
        with span("backward"):
            ctx.module.update(grad, *ctx.rates, *ctx.saved_tensors)
        return (None,) * len(ctx.needs_input_grad)
