"""Whether Triton's kernels run on a device: only where one was seen to run."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import subprocess

import torch

logger = logging.getLogger(__name__)

OLDEST_CAPABILITY = (7, 5)
"""Of a GPU that wheels for CUDA 13 hold kernels for."""
MEASURED_CAPABILITIES = ((9, 0),)
"""On which the kernels were run and timed (benchmarks/results)."""


def interpreted() -> bool:
    """Whether Triton interprets kernels on the CPU (TRITON_INTERPRET=1), as tests do."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@torch.compiler.assume_constant_result  # compiled models would trace the probe, past the caches
def usable(device: torch.device) -> bool:
    """Whether kernels run on `device`; where a GPU has to do without, one warning says why."""
    if device.type == "cuda":
        return _gpu_is_usable(device)
    return interpreted() and unusable(device) is None


@functools.cache
def _gpu_is_usable(device: torch.device) -> bool:
    why = unusable(device)
    if why is not None:
        _warn_once(f"{why}; the same is done in torch, several times slower")
    return why is None


def unusable(device: torch.device) -> str | None:
    """Why Triton's kernels do not run on `device`, in a sentence that names the remedy, or None."""
    if device.type != "cuda" and not interpreted():
        return f"Triton's kernels run on CUDA, not on {device}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed, with which the kernels for GPUs are compiled; install it"
    return _fault_of(device) if device.type == "cuda" else None


@functools.cache
def _fault_of(device: torch.device) -> str | None:
    """What goes wrong when the smallest kernel is compiled and run on `device`."""
    capability = torch.cuda.get_device_capability(device)
    name = f"{torch.cuda.get_device_name(device)} (compute capability {_dotted(capability)})"
    if capability < OLDEST_CAPABILITY:
        return f"{name} is older than {_dotted(OLDEST_CAPABILITY)}, the oldest that CUDA 13 takes"
    if capability not in MEASURED_CAPABILITIES:
        measured = ", ".join(map(_dotted, MEASURED_CAPABILITIES))
        _warn_once(f"{name} was never measured, only {measured}; python -m benchmarks.gpu does")
    try:
        from cce_torchrec.gpu import probe

        probe.run(device)
    except Exception as error:  # of any kind: the compiler's, the linker's, the driver's
        said = str(error).strip().splitlines()
        reason = said[0] if said else type(error).__name__
        if isinstance(error, subprocess.CalledProcessError):  # gcc, which lacks Python.h or libcuda
            remedy = "install Python's headers (python3-dev) and what else the compiler names above"
        elif "compiler" in reason.lower():
            remedy = "install gcc or name a C compiler in CC"
        else:
            remedy = "install a driver and a Triton that fit this GPU"
        return f"Triton does not run on {name}: {reason}; {remedy}"
    return None


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning("%s", message)
