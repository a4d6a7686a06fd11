"""A training job killed by SIGKILL again and again, and resumed: does it end bit-equal?

    python -m benchmarks.kill [--kills 20] [--plan cw] [--one-rank] [--async-checkpoints]
                              [--json FILE]

Two runs of `cce_torchrec.train` on 2 ranks (synthetic data, DLRM): one that is left alone, in the
plain loop, and one in the default pipeline, every process of which is killed while it starts,
trains, clusters or writes a checkpoint, and which is then started again with --resume. With
--one-rank one process is killed, and the others have to end by themselves.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import random
import socket
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import device_name
from cce_torchrec.checkpoint import latest_checkpoint
from cce_torchrec.checkpoint.folder import MANIFEST
from cce_torchrec.checkpoint.tensor_files import TensorWriter
from cce_torchrec.clustering import schedule
from cce_torchrec.train import __main__ as program
from cce_torchrec.versions import installed_versions

RANKS = 2
OPTIONS = [
    "--dataset",
    "synthetic",
    "--batch-size",
    "8192",
    "--compression",
    "40",
    "--checkpoint-every",
    "3",
]
MOURNING = 120.0
"""Seconds that ranks have to end once one of them was killed."""
PHASES = ["start", "training", "clustering", "checkpoint"]


@dataclass
class Kill:
    """One kill: where it was aimed, where rank 0 was, and what it left."""

    aimed: str
    hit: str
    latest: str | None
    """The checkpoint that the next start resumes from."""
    half_written: bool
    seconds: float
    """Since the job was started."""
    victim: int | None = None
    """The rank that was killed; None: all were."""
    exits: list[int] = field(default_factory=list)
    """Exit statuses of the others."""
    left: list[int] = field(default_factory=list)
    """Ranks that had not ended by themselves after `MOURNING` seconds."""
    mourned: float = 0.0
    """Seconds until all had ended."""


def job(rank: int, port: int, argv: list[str], out: Path, log: Path) -> None:
    """One rank of the training program, which notes what it is doing in `out/phase-RANK`."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), LOCAL_WORLD_SIZE=str(RANKS),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    note = out / f"phase-{rank}"

    def marked(phase: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def during(*args: Any, **kwargs: Any) -> Any:
            note.write_text(phase)
            result = call(*args, **kwargs)
            note.write_text("training")
            return result

        return during

    schedule.cluster = marked("clustering", schedule.cluster)
    # Not the whole of save_checkpoint, which plans for longer than it writes; and this is where a
    # thread writes, too.
    TensorWriter.write = marked("checkpoint", TensorWriter.write)
    program.main(argv)


def start(out: Path, options: list[str]) -> list[Any]:
    """The ranks of a job, as processes."""
    out.mkdir(parents=True, exist_ok=True)
    for rank in range(RANKS):
        (out / f"phase-{rank}").write_text("start")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["cce_torchrec.train.run"])
    argv = [*OPTIONS, *options, "--out", str(out)]
    ranks = [
        context.Process(target=job, args=(r, port, argv, out, out / "log"), daemon=True)
        for r in range(RANKS)
    ]
    for process in ranks:
        process.start()
    return ranks


def finish(out: Path, ranks: list[Any]) -> None:
    """Waits for a job that is left alone.

    Raises:
        RuntimeError: with the end of its log, if a rank failed.
    """
    for process in ranks:
        process.join()
    if any(process.exitcode != 0 for process in ranks):
        raise RuntimeError(f"the job failed:\n{(out / 'log').read_text()[-3000:]}")


def kill_at(
    out: Path, ranks: list[Any], aim: str, times: int, delay: float, victim: int | None = None
) -> Kill | None:
    """Kills all ranks `delay` seconds after rank 0 entered phase `aim` for the `times`-th time.

    Or rank `victim` alone, after which the others have to end by themselves. None if all ended
    before.
    """
    began = time.perf_counter()
    note, before = out / "phase-0", ""
    while times:
        if not all(process.is_alive() for process in ranks):
            finish(out, ranks)
            return None
        now = note.read_text()
        if now and now != before:  # empty while it is written
            times -= now == aim
            before = now
        time.sleep(0.0005)
    time.sleep(delay)
    hit = note.read_text()
    for process in ranks if victim is None else [ranks[victim]]:
        process.kill()
    killed = time.perf_counter()
    for process in ranks:
        process.join(MOURNING)
    left = [rank for rank, process in enumerate(ranks) if process.is_alive()]
    for process in ranks:
        process.kill()
        process.join()
    latest = latest_checkpoint(out / "checkpoints")
    return Kill(
        aim,
        hit,
        latest.name if latest else None,
        any(not (path / MANIFEST).exists() for path in (out / "checkpoints").glob("step-*")),
        time.perf_counter() - began,
        victim,
        [] if victim is None else [p.exitcode for r, p in enumerate(ranks) if r != victim],
        left,
        time.perf_counter() - killed,
    )


def final_state(out: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Type, shape and bytes of each tensor of the last checkpoint, shard by shard."""
    latest = latest_checkpoint(out / "checkpoints")
    if latest is None:
        raise RuntimeError(f"{out} has no checkpoint")
    found = {}
    for path in latest.glob("*.safetensors"):
        content = path.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        for name, entry in json.loads(content[8:start]).items():
            first, end = (start + at for at in entry["data_offsets"])
            found[name] = entry["dtype"], entry["shape"], content[first:end]
    return found


def metrics(out: Path) -> list[dict[str, Any]]:
    """Of each epoch the line of metrics.jsonl, without its time."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    epochs = [line for line in lines if line["kind"] == "epoch"]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in epochs]


def random_aims(kills: int, seed: int) -> list[tuple[str, int, float]]:
    """Phase, how often it is entered before the kill, and seconds into it."""
    rng = random.Random(seed)
    aims = []
    for i in range(kills):
        aim = PHASES[i % len(PHASES)]
        times = 1 if aim == "start" else rng.randint(1, 3)
        longest = {"start": 2.0, "checkpoint": 0.02}.get(aim, 0.05)
        aims.append((aim, times, rng.uniform(0, longest)))
    return aims


def compare(
    folder: Path, aims: list[tuple[str, int, float]], options: list[str], one_rank: bool = False
) -> dict[str, Any]:
    """Runs both jobs; what was killed (with `one_rank` each alone in turns), and if they differ."""
    alone, killed = folder / "alone", folder / "killed"
    finish(alone, start(alone, [*options, "--no-pipeline"]))
    done: list[Kill] = []
    for number, aim in enumerate(aims):
        ranks = start(killed, [*options, "--resume"])
        kill = kill_at(killed, ranks, *aim, victim=number % RANKS if one_rank else None)
        if kill is None:
            break  # the job ended before its last kill
        done.append(kill)
        print(f"kill {len(done)}: {kill}", flush=True)
    finish(killed, start(killed, [*options, "--resume"]))
    expected, found = final_state(alone), final_state(killed)
    differing = sorted(
        name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)
    )
    return {
        "kills": [asdict(kill) for kill in done],
        "tensors": len(expected),
        "differing": differing,
        "metrics_equal": metrics(alone) == metrics(killed),
        "epochs": len(metrics(killed)),
    }


def main() -> None:
    """Prints the kills and the verdict, writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--plan", default="cw", help="of the training program")
    parser.add_argument("--one-rank", action="store_true", help="kill one rank, each in turns")
    parser.add_argument("--async-checkpoints", action="store_true", help="of the training program")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=Path("runs/kill.json"))
    args = parser.parse_args()
    options = ["--epochs", str(args.epochs), "--clusterings", str(7 * args.epochs)]
    options += ["--plan", args.plan, *(["--async-checkpoints"] * args.async_checkpoints)]
    with tempfile.TemporaryDirectory() as folder:
        result = compare(Path(folder), random_aims(args.kills, args.seed), options, args.one_rank)
    left = sum(bool(kill["left"]) for kill in result["kills"])
    if args.one_rank:
        print(f"in {left} of them the other ranks did not end by themselves")
    hits = {phase: sum(k["hit"] == phase for k in result["kills"]) for phase in PHASES}
    print(
        f"{len(result['kills'])} kills {hits}; {result['tensors']} tensors compared, "
        f"{len(result['differing'])} differ; metrics equal: {result['metrics_equal']}"
    )
    report = {
        "device": device_name(torch.device("cpu")),
        "cpus": os.cpu_count(),
        "versions": installed_versions(),
        "ranks": RANKS,
        "settings": [*OPTIONS, *options],
        "seed": args.seed,
        "hits": hits,
        **result,
    }
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
