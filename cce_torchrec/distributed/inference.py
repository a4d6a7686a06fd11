"""Sharded lookups under `torch.inference_mode`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torchrec.distributed.types import LazyAwaitable
from torchrec.sparse.jagged_tensor import KeyedTensor

from cce_torchrec.distributed.alone import PooledNoWait


@contextmanager
def outside_inference_mode() -> Iterator[None]:
    """Does what is inside without gradients where the caller is in `torch.inference_mode`.

    FBGEMM's lookup has a kernel for that mode on GPUs only; results are the same.
    """
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


def waited_in_inference_mode(
    awaitable: LazyAwaitable[KeyedTensor],
) -> LazyAwaitable[KeyedTensor]:
    """`awaitable` of a batch size per feature, waited for where the caller is in that mode.

    What gives each example its bag has no kernel for the mode on CPUs either.
    """
    if not torch.is_inference_mode_enabled():
        return awaitable
    with outside_inference_mode():
        return PooledNoWait(awaitable.wait())
