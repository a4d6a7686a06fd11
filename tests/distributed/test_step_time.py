"""The step benchmark: what a row leaves behind, and how it reads a GPU's clock."""

from __future__ import annotations

import weakref
from types import SimpleNamespace
from unittest import mock

import torch

from benchmarks import step_time
from benchmarks.contenders import Clock, Setting
from tests.support.ranks import run_ranks

CPU = torch.device("cpu")


def measured_and_freed(rank, world_size):
    """The next row's tables would not fit beside those of this one (51 GB on a GPU)."""
    held = []

    def build(*args):
        model = real(*args)
        (lookup,) = model.module.collection._lookups
        held.extend(weakref.ref(kernel.emb_module) for kernel in lookup._emb_modules)
        return model

    setting = Setting(1000, main_rows=8, helper_rows=8, batch=16)
    with mock.patch.object(step_time, "build", build):
        row = step_time.measure(setting, CPU, 5, "rowwise_adagrad", profile=True)
    step_time.free_tables()
    assert len(held) == len(step_time.KINDS) and not any(module() for module in held)
    assert row["kernels"]["cce"] and "step" in row["milliseconds"]["dense"]


real = step_time.build


def test_a_row_frees_its_tables():
    run_ranks(1, measured_and_freed)


def test_on_a_gpu_time_is_between_events(monkeypatch):
    done = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = len(done)
            done.append("event")

        def elapsed_time(self, end):
            return float(end.at - self.at)

    cuda = SimpleNamespace(Event=Event, synchronize=lambda: done.append("wait"))
    monkeypatch.setattr(torch, "cuda", cuda)
    clock = Clock(torch.device("cuda", 0))
    clock.start()
    for part in ("forward", "backward"):
        clock.mark(part)
    assert done == ["wait", "event", "event", "event"], "nothing waits within a step"
    assert clock.read() == {"forward": 1.0, "backward": 1.0}
