"""The one place where Triton kernels are launched."""

from __future__ import annotations

from typing import Any

import torch


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """Runs `kernel` on the device of its first tensor, in its current stream."""
    device = next(arg for arg in args if isinstance(arg, torch.Tensor)).device
    # Triton launches on torch's current device, whatever device the tensors are on.
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        kernel[grid](*args, **constants)
        return
    with torch.cuda.device(device):
        kernel[grid](*args, **constants)
