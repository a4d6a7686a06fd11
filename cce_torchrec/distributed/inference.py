"""Sharded lookups under `torch.inference_mode`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


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
