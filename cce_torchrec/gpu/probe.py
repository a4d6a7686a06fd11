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
    out = torch.zeros(1, dtype=torch.int32, device=device)
    launch(_probe, (1,), out)
    capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    if not capturing and int(out) != 1:  # which waits, so that what fails does so here
        raise RuntimeError("a kernel ran and wrote nothing")
