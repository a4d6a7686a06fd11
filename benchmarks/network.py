"""Bytes that a training step sends between two gloo ranks; `benchmarks.step_time` runs it.

Every all-to-all of TorchRec is counted: lengths, ids, pooled embeddings, and their gradients.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.contenders import Clock, Setting, batches, build, keep_freed_memory, step
from benchmarks.ranks import start_ranks
from cce_torchrec.distributed.process_group import end_process_group

SETTING = Setting(10**5, tables=8, batch=4096)
CONTENDERS = {
    "plain": ("plain", "tw"),
    "CCE, chunks together": ("cce", "tw"),
    "CCE, chunks spread": ("cce", "cw"),
}


class Counted:
    """`dist.all_to_all_single`, with the bytes that leave this rank added up."""

    def __init__(self) -> None:
        self.bytes = 0
        self._real = dist.all_to_all_single
        dist.all_to_all_single = self

    def __call__(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        output_split_sizes: list[int] | None = None,
        input_split_sizes: list[int] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        rows = len(input)
        own = input_split_sizes[dist.get_rank()] if input_split_sizes else rows // 2
        self.bytes += (rows - own) * (input.numel() // max(1, rows)) * input.element_size()
        return self._real(output, input, output_split_sizes, input_split_sizes, *args, **kwargs)


def measure(repeats: int) -> dict[str, dict[str, float]]:
    """Per contender: bytes of one step from all ranks, and its median milliseconds."""
    device, counted, found = torch.device("cpu"), Counted(), {}
    clock = Clock(device, wall=True)
    kjts = batches(SETTING, device, repeats + 2, seed=dist.get_rank())
    for name, (kind, plan) in CONTENDERS.items():
        model, taken = build(SETTING, kind, device, "rowwise_adagrad", plan), []
        for i, ids in enumerate(kjts):
            dist.barrier()
            counted.bytes = 0
            taken.append(step(model, ids, clock)["step"])
            if i == 1:
                sent = torch.tensor(counted.bytes)
        dist.all_reduce(sent)
        found[name] = {"bytes": int(sent), "milliseconds": statistics.median(taken[2:])}
    return found


def run(folder: Path, repeats: int) -> dict[str, Any]:
    """Starts two ranks; what the first measured."""
    out = folder / "network.json"
    start_ranks("benchmarks.network", 2, 29656, str(out), str(repeats))
    found = json.loads(out.read_text())
    out.unlink()
    return {"setting": SETTING.name, **found}


def main() -> None:
    """One rank."""
    keep_freed_memory()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = measure(int(sys.argv[2]))
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(found))
    dist.barrier()
    end_process_group()


if __name__ == "__main__":
    main()
