"""FBGEMM's pooled lookup on a CPU with a backward made for codebooks (_backward.cpp).

FBGEMM sorts the rows of a batch, which pays where a table has many more rows than a batch reads. A
codebook has few, and a batch reads most of them.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    SplitTableBatchedEmbeddingBagsCodegen,
    WeightDecayMode,
)

from cce_torchrec.lookup import native
from cce_torchrec.torchrec_internals import become

MAX_BYTES = 4 << 20
"""float32 gradient of a table beyond which FBGEMM's backward is as fast: it leaves the caches."""
ROWS_PER_LOOKUP = 8
"""Rows of all tables to lookups of a batch, beyond which FBGEMM's backward is as fast."""


def fits(rows: int, dim: int) -> bool:
    """Whether the gradient of a table is small enough."""
    return 4 * rows * dim <= MAX_BYTES


def takes(module: Any) -> bool:
    """Whether `CodebookBags` can be the class of this FBGEMM module.

    That is: float32 tables on a CPU, none with a gradient above `MAX_BYTES`, pooled by sum, read by
    int64 ids, and row-wise Adagrad without weight decay, clipping or maximal norm.
    """
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
        and list(module.feature_table_map) == sorted(module.feature_table_map)
    )


def take_over(module: Any) -> None:
    """Makes `module` a `CodebookBags`, if that can be; it is FBGEMM's own otherwise."""
    if takes(module):
        become(module, CodebookBags)
        module.num_rows = sum(rows for rows, *_ in module.embedding_specs)


@dataclass(frozen=True)
class _Described:
    """The tables of a module as _backward.cpp reads them."""

    addresses: tuple[int, int]
    """Of the weights and of the optimizer state."""
    tables: ctypes.Array[ctypes.c_int64]
    scratch: torch.Tensor
    """Zeros, per thread."""
    values: int
    """Of the largest table."""
    rows: int
    """Of the longest table, rounded up."""


class CodebookBags(SplitTableBatchedEmbeddingBagsCodegen):
    """The same module with another backward; set as the `__class__` of one that `takes` allows.

    Lookup, weights, optimizer state and learning rate are the module's own. A batch size per
    feature, weights per sample that want a gradient, and batches of few lookups go FBGEMM's way.
    """

    num_rows: int
    """Of all tables."""
    _described: _Described

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
        compiled, of = native.library(), self._tables()
        assert compiled is not None
        if grad.stride(1) != 1:
            grad = grad.contiguous()
        lookups = (ctypes.c_int64 * 6)(
            indices.data_ptr(),
            offsets.data_ptr(),
            len(grad),
            0 if weights is None else weights.data_ptr(),
            grad.data_ptr(),
            grad.stride(0),
        )
        compiled.cce_rowwise_adagrad(
            of.tables,
            len(self.embedding_specs),
            lookups,
            rate,
            eps,
            of.scratch.data_ptr(),
            of.values,
            of.rows,
            len(of.scratch),
        )
        self._described = of

    def _tables(self) -> _Described:
        """Made anew where the tensors, or the number of threads, are others than before.

        Taken out of the module for the time of a step: a step in another thread makes its own.
        """
        known = self.__dict__.pop("_described", None)
        addresses = (self.weights_host.data_ptr(), self.momentum1_host.data_ptr())
        threads = min(torch.get_num_threads(), len(self.embedding_specs))
        if known is not None and (known.addresses, len(known.scratch)) == (addresses, threads):
            return known
        weights = self.split_embedding_weights()
        states = [state for state, *_ in self.split_optimizer_states()]
        fields, feature, column = [], 0, 0
        for table, (weight, state) in enumerate(zip(weights, states, strict=True)):
            features, dim = self.feature_table_map.count(table), weight.shape[1]
            fields += [weight.data_ptr(), state.data_ptr(), *weight.shape, features]
            fields += [feature, column]
            feature, column = feature + features, column + features * dim
        values = max(weight.numel() for weight in weights)
        rows = 32 * max(-(-len(weight) // 32) for weight in weights)
        return _Described(
            addresses=addresses,
            tables=(ctypes.c_int64 * len(fields))(*fields),
            scratch=torch.zeros(threads, values + rows // 4 + rows),
            values=values,
            rows=rows,
        )


class _Lookup(torch.autograd.Function):
    """`CodebookBags.lookup`, and `update` as its backward."""

    @staticmethod
    def forward(
        ctx: Any, anchor: torch.Tensor, module: CodebookBags, *inputs: torch.Tensor
    ) -> torch.Tensor:
        """`anchor` wants a gradient, so that the output does. Rates are kept here, as by FBGEMM."""
        ctx.module = module
        ctx.rates = module.get_learning_rate(), module.optimizer_args.eps
        ctx.save_for_backward(*inputs)
        return module.lookup(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, ...]:
        """Trains; there is nothing to pass on."""
        ctx.module.update(grad, *ctx.rates, *ctx.saved_tensors)
        return (None,) * len(ctx.needs_input_grad)
