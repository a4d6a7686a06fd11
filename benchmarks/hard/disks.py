"""Disks that are full, read-only or slow, and clocks that jump: what 2 ranks make of them.

    sudo python -m benchmarks.hard.disks [--json FILE]

Needs the right to mount a tmpfs. A sharded job saves, its disk is filled so that the next save
fails at one file or another (or is mounted read-only), and it saves again, at once and by the
thread. Every rank has to raise one clear error; the checkpoint of before has to be the latest and
to load; nothing half-written may be there once there is room and the next save has been; and the
tables have to be as if nothing had happened. Exports, vectors, metrics and vocabularies are tried
in one process.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.hard.drivers import Job, Ranks, Sharded
from benchmarks.hard.properties import assert_equal
from benchmarks.hard.soak import SPEC
from benchmarks.hard.specs import BatchSpec
from benchmarks.machine import device_name
from cce_torchrec import latest_checkpoint
from cce_torchrec.inference import inference_collection, save_inference, write_vectors
from cce_torchrec.train.records import Records
from cce_torchrec.versions import installed_versions

LEFT = (0, 16, 64, 300, 600, 800, 840, 860, 880, 900, 920, 940, 960)
"""KiB that are left on the full disk; a checkpoint here has about 900."""
SLOW, JUMP = 0.2, 86_400.0
"""Seconds of each sync, and of each jump of the clock, back and forth."""


class DiskJob(Job):
    """A job that says how a save ended, and may have a slow disk or a bad clock."""

    def attempt(self, folder: Path, step: int, blocking: bool) -> str:
        """What a save raises; "" if nothing."""
        try:
            self.save(folder, step, blocking)
        except ValueError as error:
            return str(error)
        return ""

    def slow_save(self, folder: Path, step: int, blocking: bool) -> float:
        """Seconds of a save whose every sync is slow."""
        began = time.perf_counter()

        def sync(handle: int) -> None:
            time.sleep(SLOW)

        with mock.patch("os.fsync", sync):
            self.save(folder, step, blocking)
        return time.perf_counter() - began

    def save_while_the_clock_jumps(self, folder: Path, step: int, blocking: bool) -> None:
        """A save during which the time of day goes back and forth by a day."""
        now, asked = time.time, [0]

        def jumping() -> float:
            asked[0] += 1
            return now() + (JUMP if asked[0] % 2 else -JUMP)

        with mock.patch("time.time", jumping):
            self.save(folder, step, blocking)


@contextlib.contextmanager
def disk(size: str) -> Iterator[Path]:
    """A file system of its own."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True)
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", "-l", folder], check=True)


@contextlib.contextmanager
def full(folder: Path, left: int) -> Iterator[None]:
    """The disk of `folder` has `left` KiB."""
    filler = folder / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    if left:
        with filler.open("r+b") as file:
            file.truncate(max(0, filler.stat().st_size - left * 1024))
    try:
        yield
    finally:
        filler.unlink()


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """The disk of `folder` takes nothing."""
    subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["mount", "-o", "remount,rw", folder], check=True)


def checkpoints(ranks: Ranks) -> list[dict[str, Any]]:
    """Saves of a sharded job to a disk that fails."""
    found = []
    with disk("8m") as folder:
        job = Sharded(SPEC, "cw", ranks)
        faults: list[tuple[str, Callable[[], Any]]] = [
            (f"{left} KiB left", lambda left=left: full(folder, left)) for left in LEFT
        ]
        faults.append(("read-only", lambda: read_only(folder)))
        for number, (name, fault) in enumerate(faults):
            for blocking in (True, False):
                job.call("step", BatchSpec(seed=number, bags=8, outside=False))
                job.call("save", folder, 2 * number, blocking)
                before, state = latest_checkpoint(folder), job.state()
                with fault():
                    errors = job.call("attempt", folder, 2 * number + 1, blocking)
                    latest = latest_checkpoint(folder)
                    assert all(errors) or not any(errors), errors
                    if any(errors):
                        assert latest == before, (name, latest, before)
                    assert len(set(errors)) == 1, errors
                    assert_equal(job.state(), state, exact=True)
                other = Sharded(SPEC, "tw", ranks)
                other.call("load", folder)
                assert_equal(other.state(), state, exact=True)
                job = other
                job.call("save", folder, 2 * number + 1, True)
                names = sorted(path.name for path in folder.iterdir())
                assert len(names) == 1, names  # `keep` is 1, and nothing else is left
                found.append({"disk": name, "blocking": blocking, "error": errors[0]})
    return found


def slow_and_jumping(ranks: Ranks) -> list[dict[str, Any]]:
    """Saves that are slow, or during which the clock jumps, give what others do."""
    found = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for how in ("slow_save", "save_while_the_clock_jumps"):
            for blocking in (True, False):
                job = Sharded(SPEC, "rw", ranks)
                job.call("step", BatchSpec(seed=1, bags=8, outside=False))
                seconds = job.call(how, folder, 1, blocking)
                state = job.state()
                other = Sharded(SPEC, "cw", ranks)
                other.call("load", folder)
                assert_equal(other.state(), state, exact=True)
                found.append({"save": how, "blocking": blocking, "seconds": seconds})
    return found


def files() -> list[dict[str, Any]]:
    """Other files on a disk that fails: refused by one sentence, and nothing is left."""
    found = []
    with disk("1m") as folder:
        collection = SPEC.model().collection
        served = inference_collection(collection, data_type="fp32")
        key = served.keys[0]
        lines = [{"kind": "epoch", "step": 0, "epoch": n, "val_auc": 0.5} for n in range(20_000)]
        writers: dict[str, Callable[[], object]] = {
            "export": lambda: save_inference(served, folder / "export"),
            "vectors.npy": lambda: write_vectors(served, key, folder / "vectors.npy"),
            "vectors.parquet": lambda: write_vectors(served, key, folder / "vectors.parquet"),
            "metrics": lambda: Records(lines=lines).write_metrics(folder),
            "vocabulary": lambda: _vocabulary(folder),
        }
        for fault_name, fault in (
            ("full", lambda: full(folder, 0)),
            ("100 KiB left", lambda: full(folder, 100)),
            ("read-only", lambda: read_only(folder)),
        ):
            for name, write in writers.items():
                error = ""
                with fault():
                    try:
                        write()
                    except ValueError as refused:
                        error = str(refused)
                left = sorted(path.name for path in folder.iterdir() if path.name != "filler")
                assert error and "\n" not in error, (fault_name, name, error)
                assert not left, (fault_name, name, left)
                found.append({"disk": fault_name, "file": name, "error": error})
    return found


def _vocabulary(folder: Path) -> None:
    """A vocabulary that is larger than the disk."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from cce_torchrec.data import TableDataset, TableOptions

    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "clicks.parquet"
        users = [f"user {i}" for i in range(100_000)]
        pq.write_table(pa.table({"click": [i % 2 for i in range(100_000)], "user": users}), path)
        options = TableOptions(label="click", categorical=("user",), folder=folder)
        TableDataset(path, options)


def main() -> None:
    """Prints what each fault led to, and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=Path("runs/disks.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    ranks = Ranks(2, DiskJob)
    report = {
        "device": device_name(torch.device("cpu")),
        "versions": installed_versions(),
        "files": files(),
        "checkpoints": checkpoints(ranks),
        "slow and jumping": slow_and_jumping(ranks),
    }
    ranks.close()
    for part in ("files", "checkpoints", "slow and jumping"):
        for line in report[part]:
            print(", ".join(f"{key}: {value}" for key, value in line.items()))
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
