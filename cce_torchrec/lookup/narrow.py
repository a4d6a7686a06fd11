"""Codebook rows as int32 on GPUs: half the bytes to write, to sort and to read of int64.

A lookup of CCE tables reads several rows an id, and FBGEMM sorts all of them in its backward; a
codebook has far fewer rows than int32 can tell apart. FBGEMM's kernels take both types, TorchRec
widens to int64 before them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torchrec.distributed.batched_embedding_kernel import BatchedFusedEmbeddingBag
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from cce_torchrec.torchrec_internals import become

MOST = (1 << 31) - 1
"""Rows of all tables of a module, whose positions FBGEMM counts through, and rows of a batch."""


class NarrowKernel(BatchedFusedEmbeddingBag):
    """TorchRec's kernel, which hands int32 rows on as they are; set as the `__class__` of one."""

    def forward(self, features: KeyedJaggedTensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Pooled rows, float32 [B, total_D]; a batch size per feature goes TorchRec's way."""
        rows, weights = features.values(), features.weights_or_none()
        if rows.dtype != torch.int32 or features.variable_stride_per_key() or args or kwargs:
            return super().forward(features, *args, **kwargs)
        if weights is not None and not weights.is_floating_point():
            weights = None  # as in TorchRec's own: these are not of samples
        return self.emb_module(indices=rows, offsets=features.offsets(), per_sample_weights=weights)


def take_over(kernels: Iterable[Any]) -> bool:
    """Lets `kernels`, all of one lookup, take int32 rows; False where one of them cannot.

    Those with a cache look rows up in it by int64, and data-parallel ones are torch's own.
    """
    found = list(kernels)
    if not found or not all(_takes(kernel) for kernel in found):
        return False
    for kernel in found:
        become(kernel, NarrowKernel)
    return True


def _takes(kernel: Any) -> bool:
    module = kernel.emb_module
    if type(kernel) is not BatchedFusedEmbeddingBag:
        return False
    if not isinstance(module, SplitTableBatchedEmbeddingBagsCodegen) or module.use_cpu:
        return False
    cached = module.lxu_cache_weights is not None and module.lxu_cache_weights.numel() > 0
    return not cached and sum(rows for rows, *_ in module.embedding_specs) <= MOST
