"""`python -m benchmarks.step_time [--quick] [--json FILE]`: what a training step costs.

CCE, a plain fused table of the same N and D (TorchRec's EmbeddingBagCollection), a hashed table
of the CCE table's bytes, the CCE table after finalizing, and a dense-gradient CCE in plain PyTorch
(two nn.Embedding a chunk, stored int64 indices, AdamW: what research code does). The first four
run through DistributedModelParallel on one rank with a fused optimizer. All take turns of five
batches in one process; figures are medians, on a CPU of CPU time on one thread, on a GPU between
events. JSON is written after every row. Two ranks (CPU): benchmarks/network.py.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torchrec import KeyedJaggedTensor
from torchrec.distributed import DistributedModelParallel

from benchmarks import network
from benchmarks.contenders import (
    OPTIMIZERS,
    Clock,
    Setting,
    Step,
    batches,
    build,
    dense_step,
    fresh,
    fused_step,
    keep_freed_memory,
)
from benchmarks.machine import device_name
from benchmarks.plots import ratio_plot
from benchmarks.profiled import profiled
from cce_torchrec.distributed.process_group import end_process_group
from cce_torchrec.versions import installed_versions

QUICK = [Setting(10**5, batch=1024), Setting(10**5, batch=1024, zipf=True)]
LARGE, BAGS = 2 * 10**7, {1: 32768, 4: 8192, 20: 1638}  # bag length: batch
CPU_SETTINGS = [
    Setting(LARGE, goal=1.0),
    Setting(LARGE, main_rows=2048, helper_rows=6144),
    Setting(LARGE, zipf=True, goal=1.3),
    Setting(LARGE, main_rows=16384, helper_rows=49152),
    Setting(5 * 10**5, tables=26, bag=1, batch=4096, goal=1.2),
    Setting(5 * 10**5, tables=26, bag=1, batch=4096, zipf=True),
    Setting(10**6, tables=8, batch=4096),
    *(Setting(n, zipf=zipf) for n in (10**5, 10**6) for zipf in (False, True)),
    *(Setting(10**6, dim=dim, zipf=zipf) for dim in (16, 128) for zipf in (False, True)),
    *(Setting(10**6, bag=bag, batch=BAGS[bag]) for bag in (1, 20)),
]
GPU_SETTINGS = [
    *(
        Setting(10**8, dim=128, main_rows=8192, helper_rows=24576, batch=65536, bag=bag, goal=1.0)
        for bag in (1, 10)
    ),
    *(Setting(n, zipf=True, batch=65536) for n in (10**5, LARGE)),
    Setting(10**6, tables=26, bag=1, batch=65536),
]
KINDS = ("cce", "plain", "hash", "finalized")
BLOCK = 5
"""Batches that a contender runs on end, after one that is not counted: a job runs one model, so
that the caches are its own."""


def breakdown(
    model: DistributedModelParallel,
    ids: KeyedJaggedTensor,
    clock: Clock,
    gradient: torch.Tensor | None = None,
) -> dict[str, float]:
    """A step of a CCE collection in its parts; `gradient`: of its output, by default ones."""
    sharded = model.module.collection
    context = sharded.create_context()
    clock.start()
    arrived = sharded._arrived(context, ids)
    clock.mark("input_dist")
    rows = sharded._expand(context, arrived)
    clock.mark("expansion")
    direct = sharded._is_direct(context)  # as a rank alone in its group does it
    if direct:
        pooled = [look_up(own) for look_up, own in zip(sharded._lookups, rows, strict=True)]
    else:
        pooled = sharded.embedding_bag_collection.compute(context, rows)
    clock.mark("lookup")
    if direct:
        joined = pooled[0] if len(pooled) == 1 else torch.cat(pooled, dim=1)
        out = sharded.output.assemble(joined, sharded._columns, context.divisor).values()
    else:
        out = sharded.output_dist(context, pooled).wait().values()
    clock.mark("output_dist")
    out.backward(torch.ones_like(out) if gradient is None else gradient)
    clock.mark("backward")
    return clock.read()


def serving(model: nn.Module) -> Step:
    """A forward without gradients."""

    def serve(ids: KeyedJaggedTensor, clock: Clock) -> dict[str, float]:
        with torch.no_grad():
            clock.start()
            model(ids)
            clock.mark("serve")
            return clock.read()

    return serve


def median(rows: list[dict[str, float]]) -> dict[str, float]:
    """Medians, key by key."""
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]}


def kernels(call: Step, kjts: list[KeyedJaggedTensor], clock: Clock) -> dict[str, float]:
    """The ten longest kernels of a step (on a CPU: operators) in milliseconds, by the profiler."""
    calls = [lambda ids=ids: call(fresh(ids), clock) for ids in kjts]
    return profiled(calls, kjts[0].device()).longest


def measure(
    setting: Setting, device: torch.device, repeats: int, optimizer: str, profile: bool = False
) -> dict[str, Any]:
    """One row of the table."""
    models = {kind: build(setting, kind, device, optimizer) for kind in KINDS}
    calls: dict[str, Step] = {kind: fused_step(model) for kind, model in models.items()}
    index_bytes = 16 * setting.num_ids * setting.chunks * setting.tables
    if index_bytes <= 4 << 30:
        calls["dense"] = dense_step(setting, device)
    calls |= {f"serve {kind}": serving(model) for kind, model in models.items()}
    calls["parts"] = lambda ids, clock: breakdown(models["cce"], ids, clock)
    clock = Clock(device)
    taken: dict[str, list[dict[str, float]]] = {kind: [] for kind in calls}
    for i in range(max(2, repeats // BLOCK)):
        kjts = batches(setting, device, BLOCK + 1, seed=i)
        for kind, call in calls.items():
            if kind == "dense" and i >= 2:
                continue
            block = [call(fresh(ids), clock) for ids in kjts]
            taken[kind] += block[1:]
    ms = {kind: median(rows) for kind, rows in taken.items()}
    parts = ms.pop("parts")
    for kind in models:
        ms[kind] |= ms.pop(f"serve {kind}")
    steps = {kind: values["step"] for kind, values in ms.items()}
    return {
        "kernels": {k: kernels(calls[k], kjts, clock) for k in ("cce", "plain")} if profile else {},
        "setting": asdict(setting),
        "name": setting.name,
        "milliseconds": ms,
        "cce_parts": parts,
        "cce_over_plain": steps["cce"] / steps["plain"],
        "cce_over_hash": steps["cce"] / steps["hash"],
        "finalized_over_plain": steps["finalized"] / steps["plain"],
        "finalized_over_plain_serving": ms["finalized"]["serve"] / ms["plain"]["serve"],
        "dense_over_cce": steps["dense"] / steps["cce"] if "dense" in steps else None,
    }


def line(row: dict[str, Any]) -> str:
    """A row of the table, in Markdown."""
    ms = {kind: f"{values['step']:.1f}" for kind, values in row["milliseconds"].items()}
    parts = " / ".join(f"{v:.1f}" for v in row["cce_parts"].values())
    dense = row["dense_over_cce"]
    cells = [
        row["name"],
        ms["cce"],
        ms["plain"],
        ms["hash"],
        ms["finalized"],
        ms.get("dense", ""),
        f"{row['cce_over_plain']:.2f}",
        str(row["setting"]["goal"] or ""),
        parts,
        f"{row['finalized_over_plain_serving']:.2f}",
        f"{dense:.1f}" if dense else "",
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Prints the table, writes JSON and plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small tables, under a minute")
    parser.add_argument("--json", type=Path, default=Path("runs/step_time.json"))
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--optimizer", choices=list(OPTIMIZERS), default="rowwise_adagrad")
    parser.add_argument("--profile", action="store_true", help="also the longest kernels of a step")
    parser.add_argument("--rows", type=int, nargs="*", help="only these rows of the table")
    args = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(1)
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29655")
    dist.init_process_group("nccl" if on_gpu else "gloo", rank=0, world_size=1)
    settings = QUICK if args.quick else GPU_SETTINGS if on_gpu else CPU_SETTINGS
    if args.rows is not None:
        settings = [settings[i] for i in args.rows]
    repeats = 5 if args.quick else args.repeats
    report: dict[str, Any] = {
        "device": device_name(device),
        "cpus": os.cpu_count(),
        "threads": 1,
        "versions": installed_versions(),
        "repeats": args.repeats,
        "optimizer": args.optimizer,
        "rows": [],
    }
    print("| milliseconds a step | CCE | plain | hash | finalized | dense | CCE / plain | goal |"
          " parts of CCE | finalized / plain, serving | dense / CCE |")  # fmt: skip
    print("| --- " * 11 + "|", flush=True)
    for setting in settings:
        report["rows"].append(measure(setting, device, repeats, args.optimizer, args.profile))
        print(line(report["rows"][-1]), flush=True)
        write(report, args.json)
        free_tables()
    end_process_group()
    if not on_gpu:
        report["two_ranks"] = network.run(args.json.parent, repeats)
        for name, found in report["two_ranks"].items():
            print(f"two ranks, {name}: {found}", flush=True)
        write(report, args.json)
    bars = [(row["name"], row["cce_over_plain"], row["setting"]["goal"]) for row in report["rows"]]
    ratio_plot(bars, "CCE step / plain fused step", args.json.with_suffix(".png"))


def write(report: dict[str, Any], path: Path) -> None:
    """Writes the JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")


def free_tables() -> None:
    """Gives back the tables of a row: modules of TorchRec and FBGEMM refer to themselves."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
