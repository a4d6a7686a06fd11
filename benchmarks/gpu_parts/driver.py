"""What the driver says of the GPU. Without torch."""

from __future__ import annotations

import os
import subprocess

CLOCKS = "clocks.sm,clocks.mem,temperature.gpu,power.draw"
DRIVER = "driver_version,memory.total,clocks.max.sm,clocks.max.mem,power.limit"


def nvidia_smi(fields: str) -> dict[str, str]:
    """`fields` of the first GPU that this process sees; nothing without one."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0] or "0"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "-i", first]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    lines = done.stdout.strip().splitlines() if done.returncode == 0 else []
    if not lines:
        return {}
    values = (value.strip() for value in lines[0].split(","))
    return dict(zip(fields.split(","), values, strict=False))
