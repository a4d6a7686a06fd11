"""A rank killed under `torchrun --max-restarts`: how often do the others and it come back?

    python -m benchmarks.elastic [--tries 8] [--workers bare program] [--json FILE]

A try starts torchrun with 2 ranks over gloo, one of which kills itself by SIGKILL in the first
attempt, and counts as recovered if torchrun ends without an error. `bare` is a script that calls
all_reduce and nothing of this package, `bare-restartable` the same with the package's
`start_process_group`; `program` is `cce_torchrec.train --resume`, killed at a
random moment after its second checkpoint. Each runs under several ways to start torchrun.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

WORKERS = ["bare", "bare-restartable", "program"]
OWN_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
LAUNCHES: dict[str, tuple[list[str], dict[str, str]]] = {
    "static": (["--master-addr", "127.0.0.1", "--master-port", "PORT"], {}),
    "standalone": (["--standalone"], {}),
    "c10d": (["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:PORT"], {}),
    "standalone, own store": (["--standalone"], OWN_STORE),
    "c10d, own store": (["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:PORT"], OWN_STORE),
}
LIMIT = 240
"""Seconds of a try, after which it has not recovered."""
PROGRAM = [
    "--dataset", "synthetic", "--batch-size", "8192", "--compression", "40", "--epochs", "1",
    "--clusterings", "2", "--checkpoint-every", "4", "--resume", "--timeout", "60",
]  # fmt: skip


def dies_now() -> bool:
    """Whether this is the rank and the attempt that is killed."""
    return os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"


def bare(start: Callable[[str], object]) -> None:
    """Calls all_reduce ten times; where it dies, after five."""
    import torch
    import torch.distributed as dist

    start("gloo")
    for step in range(10):
        dist.all_reduce(torch.ones(8))
        if step == 4 and dies_now():
            os.kill(os.getpid(), signal.SIGKILL)
    dist.destroy_process_group()


def program(out: str, seed: int) -> None:
    """The training program; where it dies, up to half a second after its second checkpoint."""
    from cce_torchrec.train import __main__, trainer

    save, saved = trainer.save_checkpoint, []

    def save_and_die(*args: Any, **kwargs: Any) -> Any:
        result = save(*args, **kwargs)
        saved.append(result)
        if len(saved) == 2:
            delay = random.Random(seed).uniform(0, 0.5)
            threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
        return result

    if dies_now():
        trainer.save_checkpoint = save_and_die
    __main__.main([*PROGRAM, "--out", out])


def free_port() -> int:
    """A port that nobody has at the moment."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def one_try(worker: str, launch: str, seed: int) -> dict[str, Any]:
    """Starts the job, whose rank 1 dies, and waits for its end."""
    options, variables = LAUNCHES[launch]
    port = str(free_port())
    options = [option.replace("PORT", port) for option in options]
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", *options]
        command += ["--nproc-per-node", "2", "--max-restarts", "1", "-m", "benchmarks.elastic"]
        command += ["--worker", worker, "--out", folder, "--seed", str(seed)]
        with open(Path(folder) / "log", "w+") as log:
            job = subprocess.Popen(
                command,
                env=os.environ | variables,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            try:
                code = job.wait(LIMIT)
            except subprocess.TimeoutExpired:
                job.terminate()  # torchrun ends its ranks then, which have sessions of their own
                job.wait()
                code = 1
            log.seek(0)
            text = log.read()
    errors = re.findall(r"^(?:\[rank\d+\]: ?)?\w*(?:Error|error): .*$", text, re.MULTILINE)
    return {
        "recovered": code == 0,
        "killed": "SIGKILL" in text or "exitcode: -9" in text,
        "resumed": text.count("resumed after step"),
        "seconds": round(time.perf_counter() - began, 1),
        "error": "" if code == 0 else (errors[-1][:200] if errors else f"none in {LIMIT} s"),
    }


def main() -> None:
    """Prints a line per worker and launch, writes JSON after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tries", type=int, default=8)
    parser.add_argument("--workers", nargs="+", default=WORKERS, choices=WORKERS)
    parser.add_argument("--launches", nargs="+", default=list(LAUNCHES), choices=list(LAUNCHES))
    parser.add_argument("--json", type=Path, default=Path("runs/elastic.json"))
    parser.add_argument("--worker", choices=WORKERS, help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.worker == "bare":
        from torch.distributed import init_process_group

        bare(init_process_group)
    elif args.worker == "bare-restartable":
        from cce_torchrec import start_process_group

        bare(start_process_group)
    elif args.worker == "program":
        program(args.out, args.seed)
    else:
        measure(args)


def measure(args: argparse.Namespace) -> None:
    """All tries, launches taking turns, so that what else the machine does is shared."""
    import torch

    from benchmarks.machine import device_name
    from cce_torchrec.versions import installed_versions

    results: dict[str, list[dict[str, Any]]] = collections.defaultdict(list)
    report = {
        "device": device_name(torch.device("cpu")),
        "cpus": os.cpu_count(),
        "versions": installed_versions(),
        "launches": LAUNCHES,
        "program": PROGRAM,
        "results": results,
    }
    args.json.parent.mkdir(parents=True, exist_ok=True)
    for number in range(args.tries):
        for worker in args.workers:
            for launch in args.launches:
                found = one_try(worker, launch, args.seed + number)
                results[f"{worker}, {launch}"].append(found)
                print(number, worker, launch, found, flush=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    for name, tries in results.items():
        print(f"{name}: {sum(t['recovered'] for t in tries)} of {len(tries)} recovered")


if __name__ == "__main__":
    main()
