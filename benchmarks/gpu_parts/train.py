"""The training program: does it resume bit-equal, and how many examples a second it takes."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.gpu_parts.part import Part
from benchmarks.kill import final_state, metrics
from cce_torchrec.train import options

EXAMPLES, BATCH = 180_000, 8192
"""Of the synthetic data set that are trained on in an epoch; of a step."""
STEPS = EXAMPLES // BATCH
SEED = "3"


def run(part: Part) -> None:
    """Two runs of each pipeline beside each other, their resumptions, then timed ones alone."""
    epochs = 1 if part.quick else 4
    every = STEPS * epochs // 2 + 3  # one checkpoint near the middle, one at the end
    clusterings = ["--clusterings", str(2 if part.quick else 12), "--finalize"]
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        ways = pipelines(part)

        def whole(name: str) -> None:
            saved = ["--checkpoint-every", str(every)]
            train(part, folder / name, epochs, [*ways[name], *clusterings, *saved])

        def resumed(name: str) -> None:
            saved = ["--checkpoint-every", str(every), "--resume"]
            copy_of_the_middle(folder / name, folder / f"{name}-resumed")
            train(part, folder / f"{name}-resumed", epochs, [*ways[name], *clusterings, *saved])

        beside_each_other(part, "whole", whole, list(ways))
        done = [name for name in ways if (folder / name / "summary.json").exists()]
        beside_each_other(part, "resumed", resumed, done)
        for name in done:
            with part.attempt(f"{name}: comparing"):
                _compare(part, folder, name)
        _examples(part, folder, ways)


def pipelines(part: Part) -> dict[str, list[str]]:
    """The default pipeline, and the prefetch pipeline where the program has it, on CUDA."""
    ways: dict[str, list[str]] = {"default pipeline": []}
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            options.parse(["--pipeline", "prefetch"])
    except SystemExit:
        part.note("the training program has no --pipeline prefetch")
        return ways
    if part.on_gpu:
        ways["prefetch pipeline"] = ["--pipeline", "prefetch"]
    return ways


def beside_each_other(part: Part, what: str, job: Callable[[str], None], names: list[str]) -> None:
    """`job(name)` for all `names` at once; nothing of it is timed."""
    with ThreadPoolExecutor(max_workers=max(1, len(names))) as pool:
        started = {name: pool.submit(job, name) for name in names}
    for name, future in started.items():
        with part.attempt(f"{name}, {what}"):
            future.result()


def train(part: Part, out: Path, epochs: int, more: list[str]) -> None:
    """One run of the program.

    Raises:
        RuntimeError: with the end of what it said, if it failed.
    """
    command = [
        sys.executable,
        "-m",
        "cce_torchrec.train",
        "--dataset",
        "synthetic",
        "--seed",
        SEED,
        "--batch-size",
        str(BATCH),
        "--embedding-dim",
        "16" if part.quick else "64",
        "--epochs",
        str(epochs),
        "--recipe",
        "frequent",  # clusterings of many rows, as they were timed before
        "--out",
        str(out),
        *more,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(done.stdout, done.stderr, flush=True)
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise RuntimeError(f"rc {done.returncode}: {said[-1] if said else 'said nothing'}")


def copy_of_the_middle(run_: Path, copied: Path) -> None:
    """The folder of a run as if it had been killed after its first checkpoint.

    Raises:
        RuntimeError: if the run did not keep two.
    """
    shutil.copytree(run_, copied)
    (copied / "summary.json").unlink()
    saved = sorted((copied / "checkpoints").glob("step-*"))
    if len(saved) != 2:
        raise RuntimeError(f"{run_} kept {[path.name for path in saved]}, not two checkpoints")
    shutil.rmtree(saved[1])


def _compare(part: Part, folder: Path, name: str) -> None:
    expected, found = (final_state(folder / run_) for run_ in (name, f"{name}-resumed"))
    differing = sorted(
        key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key)
    )
    same = metrics(folder / name) == metrics(folder / f"{name}-resumed")
    saved = sorted((folder / name / "checkpoints").glob("step-*"))
    row = {
        "pipeline": name,
        "resumed after": saved[0].name,
        "ended at": saved[1].name,
        "tensors": len(expected),
        "differing": len(differing),
        "metrics equal": same,
        "which": differing,
    }
    part.add("a run that was resumed, beside the same one left alone", row)
    part.goal(f"resumed, {name}: bit-equal", len(differing), 0, unit="tensors differ")


def _examples(part: Part, folder: Path, ways: dict[str, list[str]]) -> None:
    """Examples a second, epochs after the first; one run at a time."""
    epochs, clusterings = (1, "2") if part.quick else (8, "18")
    wanted = {"full, default pipeline": ["--method", "full"]}
    cce = ["--method", "cce", "--clusterings", clusterings]
    wanted |= {f"cce, {name}": [*cce, *more] for name, more in ways.items()}
    speeds: dict[str, float] = {}
    for name, more in wanted.items():
        with part.attempt(name):
            out = folder / f"timed {name}"
            train(part, out, epochs, more)
            lines = _lines(out / "metrics.jsonl")
            every = [line["seconds"] for line in lines if line["kind"] == "epoch"]
            later = every[1:] or every
            speeds[name] = STEPS * BATCH / statistics.median(later)
            summary = json.loads((out / "summary.json").read_text())
            training = sum(every) - summary["clustering_seconds"]
            row = {
                "run": name,
                "examples a second": speeds[name],
                "all epochs, clusterings taken out": STEPS * BATCH * epochs / training,
                "seconds clustering": summary["clustering_seconds"],
                "seconds": summary["seconds"],
                "validation log loss": summary["val_log_loss"],
                "settings": {k: v for k, v in summary["settings"].items() if k != "out"},
            }
            part.add("examples a second (median epoch after the first, clusterings in it)", row)
    full = speeds.get("full, default pipeline")
    for name, speed in speeds.items():
        if full and name.startswith("cce"):
            part.note(f"{name}: {speed / full:.2f} times the examples a second of full tables")


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
