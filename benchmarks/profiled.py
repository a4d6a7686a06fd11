"""What a step runs on its device, by the profiler."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import DeviceType


@dataclass(frozen=True)
class Profile:
    """Of one call, on average; on a CPU kernels are operators."""

    longest: dict[str, float]
    """Milliseconds of the ten longest kernels, by the first 150 characters of their names: those of
    C++ templates go on for thousands."""
    milliseconds: float
    """Of all kernels and copies, one after the other: what the device has to do."""
    launches: float
    """Kernels, fills and copies."""


def profiled(calls: Sequence[Callable[[], Any]], device: torch.device) -> Profile:
    """Runs `calls`, which do the same, under the profiler."""
    on_gpu = device.type == "cuda"
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CUDA if on_gpu else activity.CPU]) as profile:
        for call in calls:
            call()
        if on_gpu:
            torch.cuda.synchronize()
    own = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    events = [
        e
        for e in profile.key_averages()
        if not e.key.startswith(("[", "#"))  # named ranges
        and not getattr(e, "is_user_annotation", False)
        and (not on_gpu or e.device_type == DeviceType.CUDA)
    ]
    found = Counter[str]()
    for e in events:
        found[e.key[:150]] += getattr(e, own) / 1e3 / len(calls)
    return Profile(
        longest=dict(found.most_common(10)),
        milliseconds=sum(found.values()),
        launches=sum(e.count for e in events) / len(calls),
    )
