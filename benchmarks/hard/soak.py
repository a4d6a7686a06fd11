"""Does a job that trains for long grow? Memory, file descriptors and threads, sampled for minutes.

    python -m benchmarks.hard.soak [--minutes 30] [--ranks 2] [--trace] [--json FILE]

A cycle trains some steps, clusters, saves (in turns at once and by the thread), loads what it
saved, and in one process exports and serves; every tenth begins anew with a fresh model that loads.
All samples are taken on every rank after a garbage collection, before and after `malloc_trim`,
which gives back what glibc's arenas hold and no one uses: what shrinks by that is no leak. The
first quarter of the time is the warm-up; growth is that of the medians of the first and the last
tenth of the rest. `--trace` prints which lines allocated what stays, by tracemalloc, which slows
the soak.

A model that is given up is freed, but for one thing: torch keeps every parameter that was given to
`apply_optimizer_in_backward`, of TorchRec's own collections too. The soak has torch forget them,
or leaves them with `--keep`, which shows as growth.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib
import json
import os
import statistics
import tempfile
import time
import tracemalloc
from pathlib import Path
from typing import Any

import torch

from benchmarks.hard.drivers import Job, Local, Ranks, Sharded
from benchmarks.hard.specs import BatchSpec, ModelSpec, TableSpec
from benchmarks.machine import device_name
from cce_torchrec.inference import inference_collection, load_inference, save_inference
from cce_torchrec.versions import installed_versions

SPEC = ModelSpec(
    tables=(
        TableSpec(name="t", ids=20_000, features=("f", "g"), mean=True, width=8, chunks=4, rows=200,
                  helper=600, seen=True),
        TableSpec(name="p", ids=5_000, features=("h",), mean=False, width=32),
        TableSpec(name="u", ids=20_000, features=("h",), mean=False, width=8, chunks=2, rows=16,
                  helper=400, recipe="rare"),
    ),
    optimizer="RowWiseAdagrad",
    weighted=True,
)  # fmt: skip
FIELDS = ("rss", "trimmed", "files", "threads", "shared")


def sample() -> dict[str, int]:
    """Bytes of resident memory before and after a trim, open files, threads, shared mappings."""
    gc.collect()
    before = _resident()
    ctypes.CDLL(None).malloc_trim(0)
    return {
        "rss": before,
        "trimmed": _resident(),
        "files": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "shared": Path("/proc/self/maps").read_text().count("/dev/shm"),
    }


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class SoakJob(Job):
    """A job that also exports, says how large its process is, and can be given up."""

    def give_up(self) -> None:
        """Has torch forget the optimizers in the backward pass, which keep parameters for good."""
        # Its dictionary is weak in its keys, the parameters, and its values refer to them.
        in_backward = importlib.import_module("torch.distributed.optim.apply_optimizer_in_backward")
        in_backward.param_to_acc_grad_map.clear()
        in_backward.param_to_optim_hook_handle_map.clear()

    def serve(self, folder: Path) -> None:
        """Writes an export, loads it, and looks a batch up."""
        save_inference(inference_collection(self.collection), folder)
        load_inference(folder)(BatchSpec(seed=1, bags=16, outside=False).tensors(self.spec))

    def size(self) -> dict[str, int]:
        """A sample of this rank's process."""
        return sample()


def grown(values: list[float]) -> float:
    """Growth from the first to the last tenth, as a share."""
    tenth = max(1, len(values) // 10)
    first, last = statistics.median(values[:tenth]), statistics.median(values[-tenth:])
    return last / first - 1 if first else float(last)


class Soak:
    """Cycles over one driver."""

    def __init__(self, ranks: Ranks | None, folder: Path, keep: bool) -> None:
        self.ranks, self.folder, self.keep, self.cycles = ranks, folder, keep, 0
        self.driver = self._fresh()

    def _fresh(self) -> Local | Sharded:
        if self.cycles and not self.keep:
            self.driver.call("give_up")
        if self.ranks is not None:
            return Sharded(SPEC, ("tw", "cw", "rw")[self.cycles // 10 % 3], self.ranks)
        driver = Local(SPEC)
        driver.job = SoakJob(SPEC, None)
        return driver

    def cycle(self) -> list[dict[str, int]]:
        """One cycle; a sample of each rank."""
        self.cycles += 1
        call = self.driver.call
        for step in range(20):
            seed = self.cycles * 100 + step
            call("step", BatchSpec(seed=seed, bags=16, outside=step == 0))
        call("cluster", {"iterations": 3}, False)
        checkpoints = self.folder / "checkpoints"
        call("save", checkpoints, self.cycles, self.cycles % 2 == 0)
        if self.cycles % 10 == 0:
            self.driver = self._fresh()
        self.driver.call("load", checkpoints)
        if self.ranks is None:
            with tempfile.TemporaryDirectory(dir=self.folder) as folder:
                call("serve", Path(folder) / "export")
        return self.driver.call("size")


def run(minutes: float, num_ranks: int, trace: bool, keep: bool) -> dict[str, Any]:
    """A soak in one process or on ranks; samples, and growth after the warm-up."""
    ranks = Ranks(num_ranks, SoakJob) if num_ranks > 1 else None
    began, samples, first = time.monotonic(), [], None
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(ranks, Path(folder), keep)
        while (elapsed := time.monotonic() - began) < 60 * minutes:
            samples.append({"seconds": elapsed, "ranks": soak.cycle()})
            if trace and first is None and elapsed > 15 * minutes:
                tracemalloc.start(10)
                first = tracemalloc.take_snapshot()
        if first is not None:
            for line in tracemalloc.take_snapshot().compare_to(first, "lineno")[:15]:
                print(line)
    if ranks is not None:
        ranks.close()
    settled = [one for one in samples if one["seconds"] > 15 * minutes]
    growth = {
        field: [grown([one["ranks"][rank][field] for one in settled]) for rank in range(num_ranks)]
        for field in FIELDS
    }
    return {"cycles": soak.cycles, "growth": growth, "samples": samples}


def main() -> None:
    """Prints growth, writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--trace", action="store_true")
    parser.add_argument("--keep", action="store_true", help="what torch keeps of models given up")
    parser.add_argument("--json", type=Path, default=Path("runs/soak.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = run(args.minutes, args.ranks, args.trace, args.keep)
    print(f"{found['cycles']} cycles in {args.minutes} minutes on {args.ranks} ranks")
    for field, shares in found["growth"].items():
        print(f"{field:8} {', '.join(f'{share:+.2%}' for share in shares)}")
    report = {
        "device": device_name(torch.device("cpu")),
        "versions": installed_versions(),
        "settings": {
            "minutes": args.minutes,
            "ranks": args.ranks,
            "trace": args.trace,
            "keep": args.keep,
        },
        **found,
    }
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
