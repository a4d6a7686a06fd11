"""A step of 26 tables of 1e6 ids: CCE beside plain ones, with raw ids, with seen ids."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from torchrec import KeyedJaggedTensor

from benchmarks.contenders import Setting, batches, build, keyed
from benchmarks.gpu_parts.part import Part, largest, start_group
from benchmarks.gpu_parts.step import OPTIMIZER, ratios
from benchmarks.gpu_parts.timing import Contender, add_kernels, take_turns

FULL = Setting(10**6, dim=128, tables=26, bag=1, batch=65536, goal=1.2)
QUICK = Setting(1000, dim=32, main_rows=32, helper_rows=32, tables=4, bag=1, batch=64, goal=1.2)
OPTIONS = {"cce": {}, "hash_ids": {"hash_ids": True}, "track_seen": {"track_seen": True}}
WITH_OPTION = 1.1
"""Most that a step with an option may take over one without."""


def run(part: Part) -> None:
    """All four in one process: plain tables take 13 GB."""
    start_group(part.device)
    setting = QUICK if part.quick else FULL
    if largest(setting.tables * setting.num_ids, 4 * setting.dim + 4, part.device) < (
        setting.tables * setting.num_ids
    ):
        part.note("26 plain tables of 1e6 ids do not fit this device")
        return

    def raw(kjt: KeyedJaggedTensor) -> KeyedJaggedTensor:
        # As many different ids, of 62 bits.
        return keyed(setting, kjt.values() * 0x1E3779B97F4A7C15 & ((1 << 62) - 1))

    plain = build(setting, "plain", part.device, OPTIMIZER)
    contenders = {"plain": Contender(plain)}
    for name, options in OPTIONS.items():
        model = build(setting, "cce", part.device, OPTIMIZER, options=options)
        contenders[name] = Contender(model, raw) if name == "hash_ids" else Contender(model)

    def of(turn: int) -> list[Any]:
        return batches(setting, part.device, part.batches, seed=turn)

    ms = take_turns(contenders, of, part.device, part.turns)
    for name in contenders:
        part.add(
            "milliseconds a step",
            {
                "contender": name,
                **{key: ms[name][key] for key in ("forward", "backward", "step", "wall", "host")},
                **{f"/ {o}": ms[name]["step"] / ms[o]["step"] for o in ("plain", "cce")},
                **{f"/ {o}, on end": ms[name]["wall"] / ms[o]["wall"] for o in ("plain", "cce")},
                "setting": asdict(setting),
                "optimizer": OPTIMIZER,
            },
        )
    part.goal("26 tables: CCE / plain", ratios(ms, "cce", "plain")["cce / plain, on end"], 1.2)
    for name in ("hash_ids", "track_seen"):
        figure = ratios(ms, name, "cce")[f"{name} / cce, on end"]
        part.goal(f"26 tables: CCE with {name} / without", figure, WITH_OPTION)
    add_kernels(part, "26 tables", contenders, of(0))
