"""`python -m benchmarks.serving_shared [--quick] [--json FILE]`: many lookups of one export.

One folder of `save_inference` is looked up by one or several threads of a process, and by several
processes that map it: ids a second of all of them, and the memory of all, in which pages that
processes share count once (Linux's Pss). Every batch has 4,096 bags of an id of its own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import device_name
from benchmarks.serving import CPU, Setting, batches, collection_of, memory
from cce_torchrec.inference import inference_collection, load_inference, save_inference
from cce_torchrec.versions import installed_versions

BATCH, ROUNDS = 4096, 5
FULL = Setting(ids=2 * 10**7, rows=16384)
QUICK = Setting(ids=10**5, rows=256)


def ids_in(seconds: float, lookup: Any, own: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Ids a second of this thread, over `seconds`."""
    done, began = 0, time.perf_counter()
    while (taken := time.perf_counter() - began) < seconds:
        values, lengths = own[done % len(own)]
        lookup(values, lengths)
        done += 1
    return done * BATCH / taken


def by_threads(folder: Path, setting: Setting, count: int, seconds: float) -> float:
    """Ids a second of `count` threads of this process."""
    lookup = load_inference(folder, check=False).lookup
    every = batches(setting, BATCH, 8 * count)
    found = [0.0] * count

    def run(number: int) -> None:
        found[number] = ids_in(seconds, lookup, every[8 * number : 8 * number + 8])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(found)


def _process(
    folder: Path, setting: Setting, seconds: float, mmap: bool, number: int, pipe: Any, ready: Any
) -> None:
    torch.set_num_threads(1)
    served = load_inference(folder, mmap=mmap)  # with its checks, which read all of it
    own = batches(setting, BATCH, 8 * (number + 1))[-8:]
    served.lookup(*own[0])
    ready.wait()
    rate = ids_in(seconds, served.lookup, own)
    ready.wait()  # all have their pages still
    pipe.send((rate, memory("Pss"), memory("Rss")))
    ready.wait()


def by_processes(
    folder: Path, setting: Setting, count: int, seconds: float, mmap: bool
) -> tuple[float, int, int]:
    """Ids a second, Pss and Rss of `count` processes, all together."""
    context = multiprocessing.get_context("spawn")
    ready = context.Barrier(count)
    pipes = [context.Pipe(duplex=False) for _ in range(count)]
    processes = [
        context.Process(
            target=_process, args=(folder, setting, seconds, mmap, i, pipes[i][1], ready)
        )
        for i in range(count)
    ]
    for process in processes:
        process.start()
    found = [pipe[0].recv() for pipe in pipes]
    for process in processes:
        process.join()
    return sum(f[0] for f in found), sum(f[1] for f in found), sum(f[2] for f in found)


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small table, seconds")
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2], help="threads, processes")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    setting, seconds = (QUICK, 0.2) if args.quick else (FULL, 3.0)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as parent:
        served = inference_collection(collection_of(setting))
        folder = save_inference(served, Path(parent) / "export")
        disk = sum(file.stat().st_size for file in folder.iterdir())
        del served
        # In turns, as what else the machine does changes.
        found: dict[tuple[str, int], list[tuple[float, ...]]] = {}
        for _ in range(1 if args.quick else ROUNDS):
            for count in args.counts:
                rate = by_threads(folder, setting, count, seconds)
                found.setdefault(("threads", count), []).append((rate,))
                for kind, mmap in (("processes, mapped", True), ("processes, read", False)):
                    own = by_processes(folder, setting, count, seconds, mmap)
                    found.setdefault((kind, count), []).append(own)
    print(f"export of {disk / 1e6:.0f} MB\n| | number | million ids a second | MB, shared once |")
    print("| --- | --- | --- | --- |")
    for (kind, count), runs in found.items():
        numbers = [statistics.median(own) for own in zip(*runs, strict=True)]
        row: dict[str, Any] = {"kind": kind, "count": count, "ids_a_second": numbers[0]}
        if len(numbers) > 1:
            row |= {"pss_bytes": numbers[1], "rss_bytes": numbers[2]}
        rows.append(row)
        held = f"{numbers[1] / 1e6:.0f}" if len(numbers) > 1 else ""
        print(f"| {kind} | {count} | {numbers[0] / 1e6:.1f} | {held} |")
    if args.json:
        result = {
            "device": device_name(CPU),
            "versions": installed_versions(),
            "settings": {"seconds": seconds, "batch": BATCH, "disk_bytes": disk},
            "rows": rows,
        }
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
