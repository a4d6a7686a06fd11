"""Thousands of damaged files, each read in a process of its own: a clean error, or the same result.

    python -m benchmarks.hard.files [--cases 10000] [--only checkpoint ...] [--json FILE]

A process that has loaded everything forks for each case, damages a copy of good files and reads it.
An outcome is fine if it is an error of one sentence that the package raises on purpose, after which
nothing has changed, or the result that undamaged files give. A crash, a hang of 20 s, an allocation
of more than 1 GiB, any other exception, and a result that differs are faults.

Half of the cases of checkpoints and exports are forged: their checksums are made to fit again, as
by an attacker. These may give other values; nothing else of the above may happen.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import select
import shutil
import signal
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.hard import subjects
from benchmarks.hard.mutations import damage_folder
from benchmarks.hard.subject import Changed, Subject
from benchmarks.machine import device_name
from cce_torchrec.versions import installed_versions

LIMIT = 20.0
"""Seconds of a case."""
ROOM = 1 << 30
"""Bytes that a case may take beside what it starts with."""
FINE = ("error", "equal", "other values, forged")


@dataclass
class Case:
    """What was damaged, and how reading it ended."""

    subject: str
    seed: int | None
    damage: str
    forged: bool
    outcome: str
    message: str


def _inside(subject: Subject, folder: Path, seed: int | None, pipe: int) -> None:
    """The child: damages a copy of the files, reads it, and says how that ended."""
    told: dict[str, Any] = {"damage": "none", "forged": False}
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * os.sysconf("SC_PAGE_SIZE") + ROOM
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        own = folder / "case"
        shutil.copytree(subject.folder, own)
        if seed is not None:
            rng = random.Random(seed)
            told["damage"] = damage_folder(own, subject.donor, rng, pipes=not subject.settings)
            told["forged"] = subject.settings or (rng.random() < 0.5 and subject.forge(own))
        os.write(pipe, json.dumps(told).encode() + b"\n")  # now, as reading may be the end
        told |= _ended(subject, own, told["forged"])
    except BaseException:
        told |= {"outcome": "harness", "message": traceback.format_exc()}
    os.write(pipe, json.dumps(told | {"message": told["message"][:20_000]}).encode())


def _ended(subject: Subject, own: Path, forged: bool) -> dict[str, str]:
    try:
        same = subject.read(own)
    except Changed as error:
        return {"outcome": "changed by a refused load", "message": str(error)}
    except (ValueError, OSError) as error:
        text = str(error)
        # json's and Unicode's errors are ValueErrors too, which no one has thought of.
        if type(error) is not ValueError and not subject.allows(error):
            return {"outcome": f"raw {type(error).__name__}", "message": traceback.format_exc()}
        if "\n" in text or len(text) > 1500 or len(text) < 20:
            return {"outcome": "unclear error", "message": text}
        return {"outcome": "error", "message": text}
    except BaseException as error:
        return {"outcome": f"raw {type(error).__name__}", "message": traceback.format_exc()}
    if same:
        return {"outcome": "equal", "message": ""}
    return {"outcome": FINE[2] if forged else "other values", "message": ""}


def _said(pipe: int) -> tuple[bytes, bool]:
    """What the child says, and whether it ended in time."""
    until, parts = time.monotonic() + LIMIT, []
    while select.select([pipe], [], [], max(0.0, until - time.monotonic()))[0]:
        parts.append(os.read(pipe, 1 << 16))
        if not parts[-1]:
            return b"".join(parts), True
    return b"".join(parts), False


def run_case(subject: Subject, seed: int | None) -> Case:
    """Forks, and waits for the child; `seed` None damages nothing."""
    folder = Path(tempfile.mkdtemp(prefix="case-", dir=subject.folder.parent))
    reads, writes = os.pipe()
    child = os.fork()
    if not child:
        os.close(reads)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        _inside(subject, folder, seed, writes)
        os._exit(0)
    os.close(writes)
    told: dict[str, Any] = {"damage": "?", "forged": False, "message": ""}
    text, ended = _said(reads)
    for line in text.splitlines():
        told |= json.loads(line)
    if not ended:
        told["outcome"] = "hang"
        os.kill(child, signal.SIGKILL)
    os.close(reads)
    _, status = os.waitpid(child, 0)
    if "outcome" not in told:
        told["outcome"] = f"crash {os.waitstatus_to_exitcode(status)}"
    shutil.rmtree(folder, ignore_errors=True)
    case = Case(subject.name, seed, told["damage"], told["forged"], told["outcome"], "")
    case.message = told["message"]
    return case


def run(cases: int, names: list[str], folder: Path, first: int = 0) -> list[Case]:
    """So many cases, shared out among the subjects `names`, of seeds from `first` on."""
    made = [subjects.SUBJECTS[name](folder / name) for name in names]
    for subject in made:  # in a child, as a load changes what later cases begin with
        if (good := run_case(subject, None)).outcome != "equal":
            raise RuntimeError(f"undamaged files of {subject.name}: {good}")
    return [run_case(made[i % len(made)], first + i) for i in range(cases)]


def main() -> None:
    """Prints counts by outcome, and what is a fault; writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="seed of the first case")
    parser.add_argument("--only", nargs="+", default=subjects.available())
    parser.add_argument("--json", type=Path, default=Path("runs/files.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        found = run(args.cases, args.only, Path(folder), args.first)
    counts = Counter((case.subject, case.outcome) for case in found)
    for (subject, outcome), count in sorted(counts.items()):
        print(f"{subject:12} {outcome:28} {count:6}")
    faults = [case for case in found if case.outcome not in FINE]
    for case in faults[:40]:
        print(vars(case) | {"message": f"{case.message[:500]} ... {case.message[-700:]}"})
    report = {
        "device": device_name(torch.device("cpu")),
        "versions": installed_versions(),
        "cases": args.cases,
        "first": args.first,
        "seconds": time.monotonic() - began,
        "counts": {name: {} for name in args.only},
        "faults": [vars(case) for case in faults],
    }
    for (subject, outcome), count in counts.items():
        report["counts"][subject][outcome] = count
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
