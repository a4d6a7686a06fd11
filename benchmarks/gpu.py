"""`python -m benchmarks.gpu [--quick] [--only PART ...] [--out FOLDER] [--minutes M]`

All figures of a GPU, by one command, each beside its goal: `FOLDER/summary.md` for people and
`FOLDER/gpu.json` for programs, both rewritten after every part. A part is a process of its own
with a limit of its own; one that fails or is stopped keeps what it has found and the others go
on. Parts run in order of priority, and those for which no time is left are left out. Without a GPU
every part runs with the small shapes of `--quick`, which say that it works and nothing more.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu_parts.driver import CLOCKS, DRIVER, nvidia_smi
from benchmarks.gpu_parts.page import page

Json = dict[str, Any]


@dataclass(frozen=True)
class Limit:
    """How long a part may take."""

    seconds: float
    what: str


PARTS = {
    "step": Limit(100, "a step of one table of 1e8 ids beside a plain fused table"),
    "clustering": Limit(130, "a clustering of a chunk of 1e8 ids, its memory, and its rivals"),
    "tables26": Limit(70, "a step of 26 tables of 1e6 ids, with hash_ids and with track_seen"),
    "expansion": Limit(50, "the expansion against the bytes that it moves"),
    "published": Limit(70, "ten tables of 1e6 ids, Zipf 1.05, SGD and Adam"),
    "train": Limit(150, "the training program: bit-equal resumption, examples a second"),
    "sums": Limit(100, "whether the same work gives the same bytes"),
}
"""In order of priority."""
LEAST = 10.0
"""Seconds below which a part is not started."""
LOG_LINES = 12


class Report:
    """What the parts have found so far, and the two files that say it."""

    def __init__(self, folder: Path, settings: Json) -> None:
        self.folder = folder
        self.json: Json = {
            "device": {},
            "driver": nvidia_smi(f"{DRIVER},{CLOCKS}"),
            "versions": {},
            "settings": settings,
            "parts": {},
        }

    def add(self, name: str, found: Json) -> None:
        """Takes a part's findings and writes both files."""
        for key in ("device", "versions"):
            self.json[key] = found.pop(key, None) or self.json[key]
        self.json["parts"][name] = found
        self.write()

    def write(self) -> None:
        """gpu.json and summary.md, each replaced in one go."""
        self.folder.mkdir(parents=True, exist_ok=True)
        texts = {"gpu.json": json.dumps(self.json, indent=1) + "\n", "summary.md": page(self.json)}
        for name, text in texts.items():
            beside = self.folder / f".{name}.new"
            beside.write_text(text)
            beside.replace(self.folder / name)


def run_part(name: str, folder: Path, quick: bool, seconds: float) -> Json:
    """Runs a part for at most `seconds`; what it has found by then, and how it ended."""
    path = _json(folder, name)
    log = path.with_suffix(".log")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.gpu_parts", name, "--json", str(path)]
    environment = {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", **os.environ}
    began = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, *(["--quick"] if quick else [])],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            code = process.wait(seconds)
            state = "done" if code == 0 else f"failed (exit status {code})"
        except subprocess.TimeoutExpired:
            state = f"stopped after {seconds:.0f} s"
        finally:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # and those that it has started
                process.wait()
    found: Json = {"state": state, "seconds": time.monotonic() - began, "limit": seconds}
    found |= {"quick": quick, **_read(path)}
    if found.get("errors") and state.startswith("failed"):
        found["state"] = "failed in part" if found.get("rows") else "failed"
    if state != "done":
        found["log"] = log.read_text(errors="replace").splitlines()[-LOG_LINES:]
    return found


def _json(folder: Path, name: str) -> Path:
    """What the part `name` writes."""
    return folder / "parts" / f"{name}.json"


def _read(path: Path) -> Json:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError):
        return {}


def run(folder: Path, names: list[str], quick: bool, minutes: float) -> Report:
    """Runs the parts `names`, in the order given."""
    ends = time.monotonic() + 60 * minutes
    report = Report(folder, {"quick": quick, "minutes": minutes, "parts": names})
    report.write()
    for name in names:
        limit = PARTS[name]
        seconds = min(limit.seconds, ends - time.monotonic())
        print(f"{name}: {limit.what} (at most {max(0.0, seconds):.0f} s)", flush=True)
        if seconds < LEAST:
            report.add(name, {"state": "left out: no time", "seconds": 0.0, "limit": 0.0})
            continue
        try:
            found = run_part(name, folder, quick, seconds)
        except (KeyboardInterrupt, SystemExit):
            stopped = {"state": "stopped with this command", "seconds": 0.0, "limit": seconds}
            report.add(name, {**stopped, "quick": quick, **_read(_json(folder, name))})
            raise
        report.add(name, found)
        found = report.json["parts"][name]
        print(f"  {found['state']}, {found['seconds']:.0f} s", flush=True)
        for error in found.get("errors", []):
            print(f"  {error}", flush=True)
    return report


def main(argv: list[str] | None = None) -> None:
    """Prints the page at the end."""
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small shapes, also without a GPU")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), metavar="PART",
                        help=f"of {', '.join(PARTS)}")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--minutes", type=float, default=8.0, help="all in all; default 8")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the running part ends too
    names = [name for name in PARTS if args.only is None or name in args.only]
    report = run(args.out, names, args.quick, args.minutes)
    print(page(report.json))
    print(f"{args.out / 'summary.md'}, {args.out / 'gpu.json'}")


if __name__ == "__main__":
    main()
