"""Random state of a process as plain values: torch (CPU and CUDA), numpy and Python."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """The state of this process, ready for JSON."""
    kind, keys, position, has_gauss, cached = np.random.get_state()
    version, words, gauss = random.getstate()
    # To ask a GPU that the job has not used would set CUDA up on it.
    on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
    return {  # bytes as hexadecimal text, as JSON has none
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "cuda": torch.cuda.get_rng_state().numpy().tobytes().hex() if on_gpu else None,
        "numpy": [kind, [int(key) for key in keys], int(position), int(has_gauss), float(cached)],
        "python": [version, list(words), gauss],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Takes over what `random_state` returned."""
    torch.set_rng_state(_tensor(state["torch"]))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(_tensor(state["cuda"]))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    version, words, gauss = state["python"]
    # Python takes tuples alone, of which JSON has made lists.
    random.setstate((version, tuple(words), gauss))


def check_random_state(state: dict[str, Any]) -> None:
    """Raises whatever `set_random_state` would, and changes nothing."""
    before = random_state()
    try:
        set_random_state(state)
    finally:
        set_random_state(before)


def _tensor(text: str) -> torch.Tensor:
    # A bytearray, since torch warns of memory that it may not write to.
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
