"""A step of one table of 1e8 ids: CCE beside a plain fused table, kernel by kernel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch

from benchmarks.contenders import Clock, Setting, batches, build, fresh
from benchmarks.gpu_parts.part import Part, Row, largest, start_group
from benchmarks.gpu_parts.timing import Contender, add_kernels, median, take_turns
from benchmarks.step_time import breakdown

OPTIMIZER = "rowwise_adagrad"
FULL = Setting(10**8, dim=128, main_rows=8192, helper_rows=24576, batch=65536, goal=1.0)
QUICK = Setting(10**4, dim=32, main_rows=64, helper_rows=192, batch=256, goal=1.0)
AIM = 0.8
KINDS = ("plain", "cce", "finalized")


def run(part: Part) -> None:
    """One build of the three models, which stay; bags and distributions are of the batches."""
    start_group(part.device)
    base = QUICK if part.quick else FULL
    ids = largest(base.num_ids, 4 * base.dim + 4, part.device)
    if ids < base.num_ids:
        part.note(f"this device holds a plain table of {ids} ids, so N is not {base.num_ids}")
    base = replace(base, num_ids=ids)
    models = {
        kind: Contender(build(base, kind, part.device, OPTIMIZER)) for kind in KINDS
    }  # plain first: it takes most of the memory
    models |= {
        f"{kind}, uncounted": Contender(models[kind].model, lambda ids: fresh(ids, counted=False))
        for kind in ("plain", "cce")
    }
    for bag in (1, 10):
        for zipf in (False, True):
            setting = replace(base, bag=bag, zipf=zipf)
            with part.attempt(setting.name):
                _measure(part, setting, models, judged=ids == FULL.num_ids)


def _measure(part: Part, setting: Setting, models: Mapping[str, Contender], judged: bool) -> None:
    def of(turn: int) -> list[Any]:
        return batches(setting, part.device, part.batches, seed=turn)

    ms = take_turns(models, of, part.device, part.turns, serve=True)
    cce, kjts = models["cce"], of(0)
    row: Row = {
        "bag": setting.bag,
        "ids": "Zipf" if setting.zipf else "uniform",
        **ratios(ms, "cce", "plain"),
        "lengths to count": ms["cce, uncounted"]["wall"] / ms["plain, uncounted"]["wall"],
        **{f"{kind} {key}": ms[kind][key] for kind in KINDS for key in ("step", "wall", "host")},
        "finalized / plain, serving": ms["finalized"]["serve"] / ms["plain"]["serve"],
        "parts of cce, ms": _parts(cce, kjts * 2, part.device),
        "milliseconds": ms,
        "setting": asdict(setting),
        "optimizer": OPTIMIZER,
    }
    part.add("milliseconds a step", row)
    name = f"bag {setting.bag}, {row['ids']}"
    figure = row["cce / plain, on end"]
    part.goal(f"step, {name}: CCE / plain", figure, 1.0, AIM, judged=judged)
    add_kernels(part, name, {kind: models[kind] for kind in KINDS}, kjts)


def ratios(ms: Mapping[str, Mapping[str, float]], one: str, other: str) -> dict[str, float]:
    """Of a step from an idle device to a done one, and of steps on end, as a job takes them."""
    return {
        f"{one} / {other}": ms[one]["step"] / ms[other]["step"],
        f"{one} / {other}, on end": ms[one]["wall"] / ms[other]["wall"],
    }


def _parts(cce: Contender, kjts: list[Any], device: torch.device) -> dict[str, float]:
    clock = Clock(device)
    return median([breakdown(cce.model, k, clock, cce.gradient) for k in cce.given(kjts)])
