"""The smallest Triton kernel, to see whether a device compiles and runs any."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from cce_torchrec.gpu.launch import launch


@triton.jit
def _probe(out_ptr):  # type: ignore[no-untyped-def]  # Triton's own types
    tl.store(out_ptr, 1)


def run(device: torch.device) -> None:
    """Raises what goes wrong."""
    launch(_probe, (1,), torch.zeros(1, dtype=torch.int32, device=device))
