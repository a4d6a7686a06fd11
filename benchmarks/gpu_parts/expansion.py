"""The expansion alone, ids to codebook rows, against the bytes that it has to move."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from torchrec import KeyedJaggedTensor
from torchrec.distributed.embedding_types import KJTList

from benchmarks.contenders import Setting, batches, build
from benchmarks.gpu_parts.part import Part, start_group
from benchmarks.gpu_parts.timing import copy_rate, device_ms
from benchmarks.profiled import profiled

FULL = [
    Setting(10**8, dim=128, main_rows=8192, helper_rows=24576, batch=65536, bag=10),
    Setting(10**6, dim=128, tables=26, bag=1, batch=65536),
]
QUICK = [
    Setting(10**4, dim=32, main_rows=64, helper_rows=192, batch=256, bag=4),
    Setting(1000, dim=32, main_rows=32, helper_rows=32, tables=4, bag=1, batch=64),
]
GOAL = 1.5
SECTOR = 32
"""Bytes that a GPU's memory hands out at once: what the codes of one id cost."""
CALLS = 8


def run(part: Part) -> None:
    """Both shapes, by uniform ids; batches differ from call to call."""
    start_group(part.device)
    rate = copy_rate(part.device, part.quick)
    part.note(f"a copy reads and writes {rate / 1e9:.0f} GB a second")
    for setting in QUICK if part.quick else FULL:
        with part.attempt(setting.name):
            _measure(part, setting, rate)


def _measure(part: Part, setting: Setting, rate: float) -> None:
    model = build(setting, "cce", part.device, "rowwise_adagrad")
    sharded = model.module.collection
    context = sharded.create_context()
    arrived = [
        sharded.input_dist(context, ids).wait().wait()
        for ids in batches(setting, part.device, 2 if part.quick else CALLS)
    ]
    # What a call computes and leaves in its batch (offsets), the next one computes again.
    inputs = [_again(ids) for ids in arrived]

    def call_of(position: int) -> Callable[[], Any]:
        def call() -> Any:
            given, inputs[position] = inputs[position], _again(arrived[position])
            return sharded._expand(sharded.create_context(), given)

        return call

    calls = [call_of(position) for position in range(len(arrived))]
    milliseconds = device_ms(calls, part.device)
    profile = profiled(calls, part.device)
    moved = bytes_of(setting, arrived[0][0], sharded._expand(context, _again(arrived[0]))[0])
    floor = 1e3 * sum(moved.values()) / rate
    reads = _random_reads(part, setting, len(calls))
    part.add(
        "milliseconds an expansion",
        {
            "tables": setting.tables,
            "ids": setting.tables * setting.batch * setting.bag,
            "ms": milliseconds,
            "ms of a copy of its bytes": floor,
            "over the copy": milliseconds / floor,
            "ms of a random read an id": reads,
            "over the reads": None if reads is None else milliseconds / reads,
            "kernels ms": profile.milliseconds,
            "kernels over the copy": profile.milliseconds / floor,
            "launches": profile.launches,
            "bytes": moved,
            "copy_bytes_per_second": rate,
            "longest kernels, ms": profile.longest,
            "setting": asdict(setting),
        },
    )
    what = f"expansion, {setting.tables} x {setting.batch * setting.bag} ids / its bytes copied"
    part.goal(what, milliseconds / floor, GOAL)


def _random_reads(part: Part, setting: Setting, calls: int) -> float | None:
    if not part.on_gpu:
        return None
    from benchmarks.gpu_parts import random_reads  # here: Triton may not be installed

    return random_reads.milliseconds(setting, part.device, calls)


def _again(arrived: KJTList) -> KJTList:
    """The same batch as it arrives."""
    return KJTList(
        [
            KeyedJaggedTensor(
                keys=ids.keys(),
                values=ids.values(),
                lengths=ids.lengths(),
                stride=ids.stride(),
                length_per_key=ids.length_per_key_or_none(),
            )
            for ids in arrived
        ]
    )


def bytes_of(setting: Setting, ids: KeyedJaggedTensor, rows: KeyedJaggedTensor) -> dict[str, int]:
    """What an expansion has to read and write."""
    lengths, offsets, ends = ids.lengths(), ids.offsets(), rows.offsets()
    return {
        "ids": ids.values().numel() * ids.values().element_size(),
        "codes": ids.values().numel() * SECTOR,
        "rows": rows.values().numel() * rows.values().element_size(),
        # Offsets of the ids' bags are made from their lengths, and those of the rows' from them.
        "lengths": lengths.numel() * lengths.element_size(),
        "offsets": 2 * offsets.numel() * offsets.element_size(),
        "offsets of rows": ends.numel() * ends.element_size(),
    }
