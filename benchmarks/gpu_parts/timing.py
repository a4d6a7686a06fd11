"""Steps of contenders that take turns, and calls whose launches the device does not wait for."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torchrec import KeyedJaggedTensor

from benchmarks.contenders import Clock, fresh
from benchmarks.gpu_parts.part import Part
from benchmarks.profiled import Profile, profiled

Ids = Callable[[KeyedJaggedTensor], KeyedJaggedTensor]


def wait(device: torch.device) -> None:
    """Until the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Contender:
    """A model, and one step of it. The gradient that a network would send is made once.

    `ids`: what it makes of the batches that all contenders are given.
    """

    def __init__(self, model: nn.Module, ids: Ids = fresh) -> None:
        self.model, self._ids = model, ids
        self.gradient: torch.Tensor | None = None

    def given(self, kjts: Iterable[KeyedJaggedTensor]) -> list[KeyedJaggedTensor]:
        """The batches without what another contender has computed and left in them."""
        return [self._ids(fresh(ids)) for ids in kjts]

    def step(self, ids: KeyedJaggedTensor, clock: Clock | None = None) -> dict[str, float]:
        """Forward, and backward with the fused optimizer; milliseconds if a `clock` is given."""
        if clock is not None:
            clock.start()
        out = self.model(ids)
        if clock is not None:
            clock.mark("forward")
        if self.gradient is None:
            self.gradient = torch.ones_like(out)
        out.backward(self.gradient)
        if clock is None:
            return {}
        clock.mark("backward")
        parts = clock.read()
        return {**parts, "step": sum(parts.values())}

    def serve(self, ids: KeyedJaggedTensor, clock: Clock) -> dict[str, float]:
        """A forward without gradients."""
        with torch.no_grad():
            clock.start()
            self.model(ids)
            clock.mark("serve")
            return clock.read()

    def unwaited(self, kjts: Sequence[KeyedJaggedTensor], device: torch.device) -> dict[str, float]:
        """Milliseconds a step of steps that follow each other: all in all (`wall`), and until the
        host has launched them (`host`); where both are alike, the host is what a job waits for."""
        given = self.given(kjts)
        wait(device)
        began = time.perf_counter()
        for ids in given:
            self.step(ids)
        launched = time.perf_counter()
        wait(device)
        ended = time.perf_counter()
        n = 1e3 / len(given)
        return {"host": n * (launched - began), "wall": n * (ended - began)}

    def profile(self, kjts: Sequence[KeyedJaggedTensor], device: torch.device) -> Profile:
        """Kernels of a step."""
        return profiled([lambda ids=ids: self.step(ids) for ids in self.given(kjts)], device)


def median(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Medians, key by key."""
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]}


def take_turns(
    contenders: Mapping[str, Contender],
    batches_of: Callable[[int], list[KeyedJaggedTensor]],
    device: torch.device,
    turns: int,
    serve: bool = False,
) -> dict[str, dict[str, float]]:
    """Medians of milliseconds by contender: forward, backward, step, host, wall (and serve).

    Every turn has its own batches; a contender runs all of them on end, as a job runs one model.
    """
    clock = Clock(device)
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    walls: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    served: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    for turn in range(turns + 1):
        kjts = batches_of(turn)
        for name, contender in contenders.items():
            steps = [contender.step(ids, clock) for ids in contender.given(kjts)]
            wall = contender.unwaited(kjts * 2, device)
            if turn == 0:  # compiles kernels, takes memory
                continue
            taken[name] += steps[1:]
            walls[name].append(wall)
            if serve:
                served[name] += [contender.serve(i, clock) for i in contender.given(kjts)][1:]
    return {
        name: {
            **median(taken[name]),
            **median(walls[name]),
            **(median(served[name]) if serve else {}),
        }
        for name in contenders
    }


def add_kernels(
    part: Part, what: str, contenders: Mapping[str, Contender], kjts: Sequence[KeyedJaggedTensor]
) -> None:
    """Adds what each contender runs on the device in a step; where it fails, the rest stays."""
    with part.attempt(f"kernels, {what}"):
        for name, contender in contenders.items():
            profile = contender.profile(kjts, part.device)
            row = {"step": what, "contender": name, "kernels ms": profile.milliseconds}
            row |= {"launches": profile.launches, "longest kernels, ms": profile.longest}
            part.add("kernels of a step", row)


def device_ms(calls: Sequence[Callable[[], Any]], device: torch.device, repeats: int = 7) -> float:
    """Median milliseconds of one of `calls`, with all of them in the device's queue before it
    starts on the first: what the device takes, whatever the host does. Results are kept until
    the end, so that every call writes memory of its own."""
    _seconds(calls)
    wait(device)
    host = _seconds(calls)
    taken = []
    for _ in range(repeats):
        wait(device)
        if device.type != "cuda":
            taken.append(1e3 * _seconds(calls))
            continue
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(int(4e9 * (host + 1e-3)))  # at 2 GHz twice what the host takes
        start.record()
        kept = [call() for call in calls]
        end.record()
        torch.cuda.synchronize(device)
        taken.append(start.elapsed_time(end))
        del kept
    return statistics.median(taken) / len(calls)


def _seconds(calls: Sequence[Callable[[], Any]]) -> float:
    """Of the host, until all are launched."""
    began = time.perf_counter()
    kept = [call() for call in calls]
    seconds = time.perf_counter() - began
    del kept
    return seconds


def copy_rate(device: torch.device, small: bool) -> float:
    """Bytes a second that a copy on the device reads and writes."""
    x = torch.ones(1 << (20 if small else 29), device=device)
    y = torch.empty_like(x)
    return 2 * 4 * x.numel() / (device_ms([lambda: y.copy_(x)] * 4, device) / 1e3)
