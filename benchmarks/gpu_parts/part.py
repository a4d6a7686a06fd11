"""What a part has found so far: written whenever something is added, so that no limit loses it."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import platform
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.gpu_parts.driver import CLOCKS, nvidia_smi
from benchmarks.machine import device_name
from cce_torchrec.versions import installed_versions

Row = dict[str, Any]
SAMPLE_SECONDS = 5.0
"""Between two questions to the driver."""


@dataclass
class Part:
    """One part of the command while it runs, in a process of its own."""

    name: str
    device: torch.device
    quick: bool
    """Small shapes, which say that everything runs and nothing about goals."""
    path: Path
    """JSON."""
    found: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._sampled = -SAMPLE_SECONDS
        self.found = {"goals": [], "rows": {}, "notes": [], "errors": []}

    @property
    def on_gpu(self) -> bool:
        """Whether there is a GPU."""
        return self.device.type == "cuda"

    @property
    def batches(self) -> int:
        """Of a contender's turn; the first of them is not counted."""
        return 3 if self.quick else 6

    @property
    def turns(self) -> int:
        """Of every contender."""
        return 2 if self.quick else 8

    def add(self, table: str, row: Row) -> None:
        """A row of one of the part's tables; what is nested in it is printed below the table."""
        self.found["rows"].setdefault(table, []).append(row)
        if self.on_gpu and time.monotonic() > self._sampled + SAMPLE_SECONDS:
            self.found["clocks"], self._sampled = nvidia_smi(CLOCKS), time.monotonic()
        self.save()
        plain = {k: v for k, v in row.items() if not isinstance(v, dict | list)}
        print(f"{self.name}: {table}: {plain}", flush=True)

    def note(self, text: str) -> None:
        """A sentence for the page."""
        self.found["notes"].append(text)
        self.save()

    def goal(
        self,
        what: str,
        figure: float | None,
        goal: float,
        aim: float | None = None,
        unit: str = "times",
        at_least: bool = False,
        judged: bool = True,
    ) -> None:
        """A figure beside its goal; not judged on quick shapes, or where `judged` says so."""
        met = None
        if figure is not None and judged and not self.quick:
            met = figure >= goal if at_least else figure <= goal
        self.found["goals"].append(
            {
                "what": what,
                "figure": figure,
                "unit": unit,
                "goal": goal,
                "aim": aim,
                "at_least": at_least,
                "met": met,
            }
        )
        self.save()

    @contextlib.contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Notes what fails inside, and goes on; frees what was left on the device."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            said = str(error).strip().splitlines()
            self.found["errors"].append(
                f"{what}: {type(error).__name__}: {said[0][:300] if said else ''}"
            )
            self.save()
            # A lost context answers every later call with the same error.
            if "CUDA error" in str(error):
                raise
        finally:
            free()

    def save(self) -> None:
        """Writes the JSON."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".new")
        beside.write_text(json.dumps(self.found) + "\n")
        beside.replace(self.path)


def free() -> None:
    """Gives back what nothing refers to: modules of TorchRec and FBGEMM refer to themselves."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def machine(device: torch.device) -> dict[str, Any]:
    """The device, and what there is to know about it."""
    found: dict[str, Any] = {"name": device_name(device), "cpus": os.cpu_count()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "memory_bytes": properties.total_memory,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": getattr(properties, "L2_cache_size", None),
        }
    return found


def versions() -> dict[str, str]:
    """Of everything that a figure may depend on."""
    found = {**installed_versions(), "python": platform.python_version()}
    found["torch"] = torch.__version__
    found["cuda"] = str(torch.version.cuda)
    for name in ("fbgemm_gpu", "torchrec", "triton", "numpy"):
        with contextlib.suppress(ImportError):
            found[name.split("_")[0]] = getattr(__import__(name), "__version__", "unknown")
    return found


def start_group(device: torch.device) -> None:
    """This process as a job of one rank; the port is any that is free."""
    if dist.is_initialized():
        return
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=0, world_size=1)


def largest(num_ids: int, bytes_per_id: int, device: torch.device) -> int:
    """`num_ids`, or as many tenths of it as a plain table of them fits a smaller GPU.

    Plans leave 15 % of the memory to other things than tables.
    """
    if device.type != "cuda":
        return num_ids
    room = 0.8 * torch.cuda.get_device_properties(device).total_memory
    tenths = int(10 * room / (bytes_per_id * num_ids))
    return num_ids * max(1, min(10, tenths)) // 10
