"""A rank that is alone in its group: its lookups' output needs no distribution."""

from __future__ import annotations

import torch
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.types import LazyGetItemMixin, LazyNoWait, ShardingEnv
from torchrec.sparse.jagged_tensor import KeyedTensor

from cce_torchrec.torchrec_internals import lookups_of, sorts_columns, torchrec_kernels


class PooledNoWait(LazyGetItemMixin[str, torch.Tensor], LazyNoWait[KeyedTensor]):
    """Pooled embeddings that are there already, in the form of those that are waited for."""


def is_alone(env: ShardingEnv, inner: ShardedEmbeddingBagCollection) -> bool:
    """Whether a rank looks up for itself alone, and what lookups give is the output as it is.

    Not where kernels need to be waited for (fully sharded 2D parallelism, TorchRec's Triton
    kernels), nor where the output distribution sorts columns (plain COLUMN_WISE tables of several
    features).
    """
    kernels = [kernel for lookup in lookups_of(inner) for kernel in torchrec_kernels(lookup)]
    special = ("get_rs_awaitable", "wait_for_forward")
    waits = any(hasattr(kernel, name) for kernel in kernels for name in special)
    return env.world_size == 1 and not waits and not sorts_columns(inner)
