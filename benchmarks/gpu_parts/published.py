"""The shape that dynamicemb published figures for: ten tables of a million ids, SGD and Adam."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from benchmarks.contenders import Setting, build, keyed, shuffled
from benchmarks.gpu_parts.part import Part, Row, largest, start_group
from benchmarks.gpu_parts.step import ratios
from benchmarks.gpu_parts.timing import Contender, add_kernels, take_turns

FULL = Setting(
    10**6, dim=128, main_rows=4096, helper_rows=12288, tables=10, bag=1, batch=65536, goal=1.0
)
QUICK = Setting(1000, dim=32, main_rows=32, helper_rows=96, tables=3, bag=1, batch=64, goal=1.0)
EXPONENT = 1.05
QUOTED = {
    "sgd": {"FBGEMM": 0.959, "dynamicemb": 1.923},
    "adam": {"FBGEMM": 1.352, "dynamicemb": 2.185},
}
"""Milliseconds forward and backward on an H100, as published by dynamicemb (NVIDIA
recsys-examples); of another machine and other code around the tables, so that they stand beside."""


def run(part: Part) -> None:
    """One optimizer after the other: plain tables with Adam take 15 GB."""
    start_group(part.device)
    setting = QUICK if part.quick else FULL
    ids = setting.tables * setting.num_ids
    if largest(ids, 3 * 4 * setting.dim, part.device) < ids:
        part.note("ten plain tables of 1e6 ids with Adam do not fit this device")
        return
    if not part.on_gpu:
        part.note("FBGEMM has no Adam on CPUs: Adagrad in its place")
    for optimizer in ("sgd", "adam" if part.on_gpu else "adagrad"):
        with part.attempt(optimizer):
            _measure(part, setting, optimizer)


def _measure(part: Part, setting: Setting, optimizer: str) -> None:
    contenders = {
        kind: Contender(build(setting, kind, part.device, optimizer)) for kind in ("plain", "cce")
    }
    cdf = zipf_cdf(setting.num_ids, part.device)

    def of(turn: int) -> list[Any]:
        g = torch.Generator(device=part.device).manual_seed(turn)
        n = setting.tables * setting.batch
        return [
            keyed(setting, shuffled(zipf_ranks(cdf, n, g), setting.num_ids))
            for _ in range(part.batches)
        ]

    ms = take_turns(contenders, of, part.device, part.turns)
    quoted = QUOTED.get(optimizer, {})
    row: Row = {
        "optimizer": optimizer,
        **ratios(ms, "cce", "plain"),
        **{f"{n} {key}": ms[n][key] for n in contenders for key in ("step", "wall", "host")},
        **{f"quoted: {name}": value for name, value in quoted.items()},
        "milliseconds": ms,
        "setting": {**asdict(setting), "zipf_exponent": EXPONENT},
    }
    part.add("milliseconds forward and backward (quoted: published for an H100)", row)
    figure = row["cce / plain, on end"]
    part.goal(f"10 tables, Zipf 1.05, {optimizer}: CCE / FBGEMM's plain", figure, 1.0)
    add_kernels(part, optimizer, contenders, of(0))


def zipf_cdf(num_ids: int, device: torch.device) -> torch.Tensor:
    """float64 [num_ids]: the share of ids of rank at most r, whose density is r^-1.05."""
    ranks = torch.arange(1, num_ids + 1, dtype=torch.float64, device=device)
    return ranks.pow_(-EXPONENT).cumsum(0)


def zipf_ranks(cdf: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """`count` ranks from 0 on, by the inverse of `cdf`."""
    uniform = torch.rand(count, dtype=torch.float64, generator=generator, device=cdf.device)
    return torch.searchsorted(cdf, uniform * cdf[-1]).clamp_(max=len(cdf) - 1)
