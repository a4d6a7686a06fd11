"""How much of a GPU's memory a clustering step may take."""

from __future__ import annotations

import torch


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on `device`: the driver's, and what torch keeps unused."""
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + unused
