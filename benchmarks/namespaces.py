"""A job over two machines, one of which is killed and brought back: does it come back?

    python -m benchmarks.namespaces [--tries 20] [--workers bare program] [--json FILE]

The machines are two network namespaces with names and addresses of their own (benchmarks/nodes.py;
it takes Linux and root). Each runs `torchrun --nnodes 2 --rdzv-backend c10d`. A try kills all
processes of one machine by SIGKILL at a random moment, starts its torchrun again up to 3 seconds
later, and counts as recovered if both end without an error. `bare` is a script that calls
all_reduce and nothing of this package; `program` is `cce_torchrec.train --resume`, whose last
checkpoint and metrics are compared with those of a run that was left alone.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.nodes import Node, two_nodes

WORKERS = ("bare", "program")
LAUNCHES: dict[str, dict[str, str]] = {
    "own store": {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
    "shared store": {},
}
"""How torchrun is started: with the variable of docs/elastic_restart.md, and as it is."""
FAILURES = ("kill", "power", "first")
"""`kill`: of the second machine, whose kernel closes its connections. `power`: nobody hears of it.
`first`: of the first machine, which has the rendezvous; a torchrun that fails is started again."""
STARTS = 5
"""Of torchrun on each machine, after which the failure `first` has not recovered."""
LIMIT = 240.0
"""Seconds of a try, after which it has not recovered."""
STEPS = 30
"""Of the bare script, each of which takes a tenth of a second."""
OPTIONS = (
    "--dataset", "synthetic", "--batch-size", "8192", "--compression", "40", "--epochs", "2",
    "--clusterings", "4", "--checkpoint-every", "4", "--timeout", "60", "--resume",
)  # fmt: skip
"""Of the training program: the checkpoints of a run that takes seconds."""


def bare(out: Path) -> None:
    """Calls all_reduce again and again, and says how often in `out/progress`."""
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=timedelta(seconds=60))  # that of the program
    for step in range(STEPS):
        dist.all_reduce(torch.ones(8))
        if dist.get_rank() == 0:
            (out / "progress").write_text(str(step))
        time.sleep(0.1)
    dist.destroy_process_group()


def under_way(worker: str, out: Path) -> bool:
    """Whether the job does what it is for, and has something to go on from."""
    if worker == "bare":
        note = out / "progress"
        return note.exists() and int(note.read_text() or 0) >= 5
    from cce_torchrec.checkpoint import latest_checkpoint

    latest = latest_checkpoint(out / "checkpoints")
    return latest is not None and latest.name >= "step-000000008"


class Job:
    """One torchrun on each of two nodes."""

    def __init__(
        self, nodes: tuple[Node, Node], program: Sequence[str], *, log: Path, launch: str
    ) -> None:
        self.nodes, self.program, self.log = nodes, program, log
        self.variables: Mapping[str, str] = LAUNCHES[launch]
        self.starts, self.allowed = [0, 0], [1, 1]
        self.agents = [self.start(0), self.start(1)]

    def start(self, number: int) -> subprocess.Popen[bytes]:
        """Starts the torchrun of a node."""
        node = self.nodes[number]
        self.starts[number] += 1
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
        command += ["--nproc-per-node", "1", "--max-restarts", "3", "--rdzv-backend", "c10d"]
        command += ["--rdzv-endpoint", f"{self.nodes[0].host}:29500", *self.program]
        return node.start(command, log=self.log, variables=self.variables)

    def fail(self, failure: str, seconds: float) -> None:
        """Kills what runs on a node, and starts it again after `seconds`."""
        number = 0 if failure == "first" else 1
        node = self.nodes[number]
        if failure == "power":
            node.set_cable("down")
        node.kill()
        self.agents[number].wait()
        time.sleep(seconds)
        if failure == "power":
            node.set_cable("up")
        self.agents[number] = self.start(number)
        # Without the rendezvous the other torchrun ends, and somebody has to start it again.
        self.allowed = [STARTS, STARTS] if failure == "first" else list(self.starts)

    def ended(self, limit: float) -> bool:
        """Whether both ended without an error within `limit` seconds."""
        until = time.monotonic() + limit
        while time.monotonic() < until:
            codes = [agent.poll() for agent in self.agents]
            if codes == [0, 0]:
                return True
            for number, code in enumerate(codes):
                if code:
                    if self.starts[number] == self.allowed[number]:
                        return False
                    self.agents[number] = self.start(number)
            time.sleep(0.05)
        return False

    def wait_until_under_way(self, worker: str, out: Path) -> None:
        """Waits for what `under_way` says.

        Raises:
            RuntimeError: with the end of the log, if the job ended before.
        """
        while not under_way(worker, out):
            if any(agent.poll() is not None for agent in self.agents):
                raise RuntimeError(f"{worker} ended early:\n{self.log.read_text()[-3000:]}")
            time.sleep(0.02)


def command_of(worker: str, out: Path) -> list[str]:
    """What torchrun starts."""
    if worker == "bare":
        return ["-m", "benchmarks.namespaces", "--worker", "--out", str(out)]
    return ["-m", "cce_torchrec.train", *OPTIONS, "--out", str(out)]


def one_try(
    worker: str, *, launch: str, seed: int, out: Path, failure: str = "kill"
) -> dict[str, Any]:
    """A job with results in `out`, one of whose nodes is killed and brought back."""
    rng = random.Random(seed)
    out.mkdir()
    began = time.perf_counter()
    with two_nodes() as nodes:
        log = out / "log"
        job = Job(nodes, command_of(worker, out), log=log, launch=launch)
        job.wait_until_under_way(worker, out)
        time.sleep(rng.uniform(0, 1))
        job.fail(failure, rng.uniform(0, 3))
        returned = time.perf_counter()
        recovered = job.ended(LIMIT)
        ended = time.perf_counter()
    text = log.read_text()
    return {
        "recovered": recovered,
        "seconds": round(ended - began, 1),
        "seconds_after_return": round(ended - returned, 1),
        "starts": job.starts,
        "resumed": text.count("resumed after step"),
        "error": "" if recovered else last_error(text),
    }


def last_error(text: str) -> str:
    """The last line of a log that looks like an error."""
    pattern = r"^(?:\[rank\d+\]: ?)?[\w.]*(?:Error|error): .*$"
    errors = re.findall(pattern, text, re.MULTILINE)
    return errors[-1][:200] if errors else f"none in {LIMIT:.0f} s"


def same_end(alone: Path, out: Path) -> bool:
    """Whether two runs of the program left the same tensors, bit by bit, and the same metrics."""
    from benchmarks.kill import final_state, metrics

    return final_state(alone) == final_state(out) and metrics(alone) == metrics(out)


def run_alone(out: Path) -> None:
    """The program on the same two nodes, left alone.

    Raises:
        RuntimeError: with the end of its log, if it failed.
    """
    with two_nodes() as nodes:
        log = out.parent / f"{out.name}.log"
        job = Job(nodes, command_of("program", out), log=log, launch="own store")
        if not job.ended(LIMIT):
            raise RuntimeError(f"the run that is left alone failed:\n{log.read_text()[-3000:]}")


def measure(args: argparse.Namespace) -> None:
    """All tries, workers taking turns, so that what else the machine does is shared."""
    import torch

    from benchmarks.machine import device_name
    from cce_torchrec.versions import installed_versions

    results: dict[str, list[dict[str, Any]]] = collections.defaultdict(list)
    report = {
        "device": device_name(torch.device("cpu")),
        "cpus": os.cpu_count(),
        "versions": installed_versions(),
        "options": OPTIONS,
        "seed": args.seed,
        "tries": results,
    }
    args.json.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        alone = Path(folder) / "alone"
        if "program" in args.workers:
            run_alone(alone)
        cases = [(w, la, f) for la in args.launches for f in args.failures for w in args.workers]
        for number in range(args.tries):
            for worker, launch, failure in cases:
                with tempfile.TemporaryDirectory() as again:
                    out = Path(again) / "out"
                    found = one_try(
                        worker, launch=launch, seed=args.seed + number, out=out, failure=failure
                    )
                    if worker == "program" and found["recovered"]:
                        found["equal"] = same_end(alone, out)
                results[f"{worker}, {launch}, {failure}"].append(found)
                print(number, worker, launch, failure, found, flush=True)
            args.json.write_text(json.dumps(report, indent=1) + "\n")
    for name, tries in results.items():
        print(f"{name}: {sum(t['recovered'] for t in tries)} of {len(tries)} recovered")


def main() -> None:
    """Prints a line per try, writes JSON after each round."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tries", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="one try of each")
    parser.add_argument("--workers", nargs="+", default=WORKERS, choices=WORKERS)
    launches = list(LAUNCHES)
    parser.add_argument("--launches", nargs="+", default=launches[:1], choices=launches)
    parser.add_argument("--failures", nargs="+", default=FAILURES[:1], choices=FAILURES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=Path("runs/namespaces.json"))
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.tries = 1 if args.quick else args.tries
    if args.worker:
        bare(args.out)
    else:
        measure(args)


if __name__ == "__main__":
    main()
