"""`python -m benchmarks.kmeans [--quick] [--json FILE]`: our K-means, FAISS and scikit-learn.

The same points, the same start, the same iterations, one thread, one process. FAISS and
scikit-learn get the materialised vectors of all ids (making them is not timed); ours gets the
codes, as in a clustering step, and its time includes finding the pairs and rewriting the codes of
all ids. Seconds are CPU time, the median of interleaved repeats (one where FAISS takes long).
Memory is measured in processes of their own. With `--part` and `--only` the whole is measured in
pieces, which one JSON collects as long as the code stays the same.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import faiss
import torch

import cce_torchrec
from benchmarks.kmeans_problem import CPU, FULL, QUICK, Problem, Shape, peers
from benchmarks.machine import device_name
from benchmarks.plots import ratio_plot
from benchmarks.ranks import start_ranks
from cce_torchrec.clustering.options import Options
from cce_torchrec.clustering.pairs import find_pairs
from cce_torchrec.distributed.process_group import end_process_group
from cce_torchrec.kmeans import kmeans
from cce_torchrec.kmeans.backends import make_backend
from cce_torchrec.versions import installed_versions

PARTS = ("timing", "memory", "ranks", "training")


def measure(shape: Shape, repeats: int) -> dict[str, object]:
    """Seconds and objectives of one shape."""
    problem = Problem(shape)
    x = problem.vectors()
    others = peers(shape)
    seconds: dict[str, list[float]] = {name: [] for name in ("ours", *others)}
    objective: dict[str, float] = {}
    for repeat in range(repeats if shape.scores < 3e9 else 1):
        for name in seconds:
            if name.startswith("sklearn") and repeat:
                continue
            problem.reset()
            began = time.process_time()
            mine = name == "ours"
            centroids = problem.ours() if mine else others[name](x, shape, problem.start)
            taken = time.process_time() - began
            seconds[name].append(problem.seconds if shape.assign_only and mine else taken)
            if name not in objective:
                objective[name] = problem.objective(x, centroids)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "seconds": medians,
        "repeats": seconds,
        "faiss_over_ours": medians["faiss"] / medians["ours"],
        "goal": shape.goal,
        "objective_over_faiss": {n: v / objective["faiss"] for n, v in objective.items()},
        "vectors_bytes": x.numel() * 4,
    }


def memory(shape: Shape) -> dict[str, object]:
    """Peak of resident memory beside the codes, in a process that gives back what it frees."""
    small = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.kmeans", "--memory-of", shape.name],
        env={**os.environ, **small},
        check=True,
        stdout=subprocess.PIPE,
    )
    found: dict[str, object] = json.loads(done.stdout)
    return found


def memory_here(shape: Shape) -> dict[str, object]:
    """What `memory` runs (Linux)."""

    def status(field: str) -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1]) * 1024
        return 0

    problem = Problem(shape)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    problem.ours()
    computed = problem.plan.working_bytes + problem.plan.code_bytes
    return {"peak_extra_bytes": status("VmHWM") - before, "computed_peak_bytes": computed}


RANK_SHAPES = {
    "pairs": Shape(10**6, 1024, 3072, 16, 6),
    "list": Shape(2 * 10**5, 2048, 3 * 2048, 16, 3),
    "quick": Shape(10**5, 256, 768, 16, 3),
}
"""One K-means over shared points: of a table over all pairs, and of a list of the ids' pairs."""


def by_ranks(world_size: int, name: str) -> float:
    """Wall seconds of one shared K-means on gloo ranks."""
    with tempfile.NamedTemporaryFile("r") as out:
        arguments = ("--rank-of", name, "--json", out.name)
        start_ranks("benchmarks.kmeans", world_size, 29611, *arguments)
        return float(json.loads(Path(out.name).read_text()))


def one_rank(shape: Shape, out: Path) -> None:
    """What each rank of `by_ranks` runs."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    problem = Problem(shape)
    points = find_pairs(problem.state, problem.plan).points
    taken = []
    for _ in range(3):
        dist.barrier()
        began = time.perf_counter()
        kmeans(
            points,
            shape.k,
            shape.iterations,
            init=problem.start,
            process_group=dist.group.WORLD,
            score_bytes=problem.plan.score_bytes,
        )
        taken.append(time.perf_counter() - began)
    if dist.get_rank() == 0:
        out.write_text(json.dumps(statistics.median(taken)))
    end_process_group()


def training_share(data: str, quick: bool) -> dict[str, float]:
    """Seconds in clustering of a GMF run on MovieLens-1M, 18 clusterings."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [
                sys.executable,
                "-m",
                "cce_torchrec.train",
                "--model",
                "gmf",
                "--dataset",
                "ml-1m",
                "--data",
                data,
                "--embedding-dim",
                "32",
                "--params-per-dim",
                "256",
                "--epochs",
                "2" if quick else "10",
                "--clusterings",
                "18",
                "--out",
                folder,
            ],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        summary = json.loads((Path(folder) / "summary.json").read_text())
    share = summary["clustering_seconds"] / summary["seconds"]
    keys = ("seconds", "clustering_seconds", "best_val_log_loss")
    return {"share": share, **{key: summary[key] for key in keys}}


def code_version() -> str:
    """Digest of the sources that are measured."""
    root = Path(cce_torchrec.__file__).parent
    files = sorted(f for f in root.rglob("*") if f.suffix in (".py", ".cpp", ".h"))
    measured = ("kmeans", "clustering")
    files = [f for f in files if f.parent.name in measured or f.stem == "hashing"]
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()[:16]


def start_report(path: Path) -> dict[str, Any]:
    """What is measured so far, if by the same code; else an empty report."""
    report = {
        "code": code_version(),
        "device": device_name(CPU),
        "cpus": os.cpu_count(),
        "threads": 1,
        "versions": {**installed_versions(), "faiss": faiss.__version__},
        "backend": make_backend("auto", CPU).name,
        "options": str(Options()),
        "rows": {},
    }
    if path.exists():
        before = json.loads(path.read_text())
        if all(before.get(key) == report[key] for key in ("code", "device", "versions")):
            return dict(before)
    return report


def line(name: str, row: dict[str, Any]) -> str:
    """One line of the table."""
    seconds, goal, objective = row["seconds"], row["goal"], row["objective_over_faiss"]["ours"]
    peers = "".join(
        f"{seconds[peer]:10.3f}" if peer in seconds else f"{'':10}"
        for peer in ("ours", "faiss", "sklearn", "sklearn-minibatch")
    )
    peak = row.get("peak_extra_bytes", 0) / 1e6
    target = "" if goal is None else f"{goal:.2g}"
    return f"{name:44}{peers}{row['faiss_over_ours']:7.1f}{target:>6}{objective:11.4f}{peak:7.0f}"


def main() -> None:
    """Prints the table, writes JSON and plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small shapes, under a minute")
    parser.add_argument("--json", type=Path, default=Path("runs/kmeans.json"))
    parser.add_argument("--data", help="folder of MovieLens-1M, for the share of a training run")
    parser.add_argument("--part", choices=PARTS, action="append", help="only this; may repeat")
    parser.add_argument("--only", default="", help="only shapes whose name contains this")
    parser.add_argument("--rank-of", help=argparse.SUPPRESS)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    if args.rank_of:
        one_rank(RANK_SHAPES[args.rank_of], args.json)
        return
    if args.memory_of:
        shape = next(s for s in [*FULL, *QUICK] if s.name == args.memory_of)
        print(json.dumps(memory_here(shape)))
        return
    run(args, start_report(args.json), args.part or PARTS)


def run(args: argparse.Namespace, report: dict[str, Any], parts: Sequence[str]) -> None:
    """Measures `parts` into `report`, and writes it after every row."""

    def write() -> None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n")

    shapes = [s for s in (QUICK if args.quick else FULL) if args.only in s.name]
    head = "".join(f"{name:>10}" for name in ("ours s", "FAISS", "sklearn", "minibatch"))
    print(f"{'':44}{head}{'ratio':>7}{'goal':>6}{'objective':>11}{'MB':>7}")
    for shape in shapes:
        row = report["rows"].setdefault(shape.name, {})
        if "timing" in parts:
            row.update(measure(shape, 1 if args.quick else 3))
        if "memory" in parts:
            row.update(memory(shape))
        if "seconds" in row:
            print(line(shape.name, row), flush=True)
        write()
    if "ranks" in parts:
        report["wall_seconds_by_ranks"] = {
            name: {str(n): by_ranks(n, name) for n in (1, 2)}
            for name in (["quick"] if args.quick else ["pairs", "list"])
        }
        print(f"shared K-means, wall seconds by ranks: {report['wall_seconds_by_ranks']}")
    if "training" in parts and args.data:
        report["training_share"] = training_share(args.data, args.quick)
        print(f"MovieLens-1M, 18 clusterings: {report['training_share']['share']:.1%} of the run")
    write()
    rows = [(s.name, report["rows"].get(s.name, {})) for s in (QUICK if args.quick else FULL)]
    bars = [(name, r["faiss_over_ours"], r["goal"]) for name, r in rows if "seconds" in r]
    if bars:
        ratio_plot(bars, "FAISS seconds / ours", args.json.with_suffix(".png"))
    print(f"{args.json}, {args.json.with_suffix('.png')}")


if __name__ == "__main__":
    main()
