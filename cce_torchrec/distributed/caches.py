"""FBGEMM's caches in front of tables in unified memory (CUDA, FUSED_UVM_CACHING)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from cce_torchrec.torchrec_internals import fused_kernels


def _cached(lookups: Iterable[nn.Module]) -> Iterator[Any]:
    """Modules that have a cache."""
    for _, module in fused_kernels(lookups):
        weights = getattr(module, "lxu_cache_weights", None)
        if weights is not None and weights.numel():
            yield module


@contextmanager
def bypassed(lookups: Iterable[nn.Module]) -> Iterator[None]:
    """Rows behind caches may be read and written inside; the caches are empty afterwards.

    They are written back before. Batches that were prefetched have to be once more: see
    `forget_prefetched`.
    """
    modules = list(_cached(lookups))
    for module in modules:
        module.flush()
    try:
        yield
    finally:
        for module in modules:
            module.reset_cache_states()
            # FBGEMM resets which rows are cached, and not which lines prefetched batches lock.
            if hasattr(module, "lxu_cache_locking_counter"):
                module.lxu_cache_locking_counter.zero_()


def forget_prefetched(lookups: Iterable[nn.Module]) -> None:
    """Drops where the caches hold the oldest batch that was prefetched; the lookup asks anew."""
    for module in _cached(lookups):
        # A lookup takes the first of each queue, and where there is none finds the rows itself.
        for waiting in (module.timesteps_prefetched, module.lxu_cache_locations_list):
            if waiting:
                waiting.pop(0)
