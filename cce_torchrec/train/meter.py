"""Loss, AUC, throughput and memory of the examples trained since the last line of metrics.jsonl."""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torchrec.optim.keyed import CombinedOptimizer

from cce_torchrec.metrics import BINS, add_logits, histogram_auc

_FOLD_ROWS = 1 << 18
_FOLD_STEPS = 256
"""Outputs of steps that wait until they are added up at once: a step pays for none of it."""
_OWN = 3
"""Numbers of each rank: examples, seconds, memory."""


class TrainMeter:
    """Adds up what steps give on their device, and reads it when a line is due.

    Args:
        device: of this rank.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        # In double precision numbers up to 2^53 are exact, and one sum over the ranks does for all.
        size = 2 * BINS + 1 + _OWN * self._world_size
        self._totals = torch.zeros(size, dtype=torch.float64, device=device)
        self._outputs: list[tuple[torch.Tensor, ...]] = []
        self._examples = self._waiting = 0
        self._seconds, self._since = 0.0, time.perf_counter()

    @property
    def empty(self) -> bool:
        """Whether nothing was trained since the last line."""
        return not self._outputs and not self._examples

    def add(self, output: tuple[torch.Tensor, ...]) -> None:
        """Takes what a step gave: its mean loss, logits [B] and labels [B]."""
        self._outputs.append(output)
        rows = len(output[-1])
        self._examples += rows
        self._waiting += rows
        if self._waiting >= _FOLD_ROWS or len(self._outputs) >= _FOLD_STEPS:
            self._fold()

    def _fold(self) -> None:
        if self._outputs:
            losses, logits, labels = zip(*self._outputs, strict=True)
            add_logits(self._totals[: 2 * BINS], torch.cat(logits), torch.cat(labels))
            rows = torch.tensor([len(own) for own in labels], dtype=torch.float64)
            mean = torch.stack(losses).double()
            self._totals[2 * BINS] += mean @ rows.to(self._device, non_blocking=True)
        self._outputs, self._waiting = [], 0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, time passes that is not for training: clusterings, validation, checkpoints."""
        self._seconds += time.perf_counter() - self._since
        try:
            yield
        finally:
            self._since = time.perf_counter()

    def start(self) -> None:
        """Time counts from now on."""
        self._since = time.perf_counter()

    def line(self) -> dict[str, Any]:
        """What a line says of the examples since the last one, of all ranks. Collective."""
        self._fold()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # or the seconds would not be those of the steps
        seconds = self._seconds + time.perf_counter() - self._since
        own = torch.tensor(
            [self._examples, seconds, used_memory(self._device)], dtype=torch.float64
        )
        histogram, loss, ranks = self._totals.split([2 * BINS, 1, _OWN * self._world_size])
        ranks.view(-1, _OWN)[self._rank] = own.to(self._device)
        if self._world_size > 1:  # alone, gloo would take a millisecond all the same
            dist.all_reduce(self._totals)
        by_rank = ranks.view(-1, _OWN).tolist()
        examples = sum(count for count, _, _ in by_rank)
        mean = float(loss) / max(examples, 1.0)
        line = {
            "examples": int(examples),
            "loss": mean,
            # A histogram counts what is no number as a number.
            "auc": histogram_auc(histogram)[0] if mean == mean else mean,
            "examples_per_second": examples / max(took for _, took, _ in by_rank),
            "examples_per_second_per_rank": [count / took for count, took, _ in by_rank],
            "memory": [int(used) for _, _, used in by_rank],
        }
        self._totals.zero_()
        self._examples, self._seconds = 0, 0.0
        self.start()
        return line


def used_memory(device: torch.device) -> int:
    """Bytes of this process that are in memory; on CUDA the most that tensors have taken so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # not Linux, which alone tells what is in memory now: the most there was
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024


def rates(optimizer: CombinedOptimizer) -> dict[str, float]:
    """The learning rates of the optimizer of `job.build`, by what they train."""
    found: dict[str, float] = {}
    for name, (_, own) in zip(("tables", "network"), optimizer.optimizers, strict=False):
        # FBGEMM has them in single precision.
        values = list(dict.fromkeys(float(f"{group['lr']:.6g}") for group in own.param_groups))
        found |= {name if not i else f"{name}_{i}": value for i, value in enumerate(values)}
    return found
