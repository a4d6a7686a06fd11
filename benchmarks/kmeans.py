"""`python -m benchmarks.kmeans [--quick] [--json FILE]`: our K-means, FAISS and scikit-learn.

The same points, the same start, the same iterations, one thread, one process. FAISS and
scikit-learn get the materialised vectors of all ids (making them is not timed); ours gets the
codes, as in a clustering step, and its time includes finding the pairs and rewriting the codes of
all ids. Seconds are CPU time, the median of interleaved repeats.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import faiss
import torch

from benchmarks.machine import device_name
from benchmarks.plots import ratio_plot
from cce_torchrec import CCEEmbeddingBagConfig
from cce_torchrec.clustering.chunk import ChunkState, budget, find_pairs, new_codes_of
from cce_torchrec.clustering.ids import PairTable
from cce_torchrec.clustering.solve import Options
from cce_torchrec.expand import ChunkCodes
from cce_torchrec.kmeans import kmeans
from cce_torchrec.kmeans.backends import make_backend
from cce_torchrec.versions import installed_versions

CPU = torch.device("cpu")
LIMIT = 1 << 30


@dataclass(frozen=True)
class Shape:
    """One problem. `goal`: least ratio of FAISS's seconds to ours; None: only reported."""

    num_ids: int
    k: int
    k_helper: int
    dim: int
    iterations: int
    goal: float | None = None
    assign_only: bool = False

    @property
    def name(self) -> str:
        """For the table and the plot."""
        kind = "assign" if self.assign_only else f"{self.iterations} it"
        return f"N={self.num_ids:.0e} k={self.k} k'={self.k_helper} s={self.dim} {kind}"


QUICK = [
    Shape(10**5, 256, 256, 16, 5),
    Shape(10**6, 256, 256, 16, 5),
    Shape(10**5, 256, 768, 4, 5),
]
FULL = [
    Shape(10**7, 1024, 1024, 16, 6, 8),
    Shape(10**7, 1024, 3072, 16, 6, 3),
    Shape(10**7, 1024, 1024, 32, 0, 8, assign_only=True),
    *(Shape(10**6, 256, 256, s, 20, goal) for s, goal in ((4, 3), (16, 5), (32, 8))),
    *(Shape(10**6, 256, 768, s, 20, goal) for s, goal in ((4, 1.3), (16, 1.8), (32, 2.7))),
    *(
        Shape(n, k, 3 * k, s, 5, 1 / 1.1)
        for n in (10**5, 10**6)
        for k in (256, 1024, 4096)
        for s in (4, 16, 32)
        if not (n == 10**6 and k == 256)
    ),
]


class Problem:
    """A chunk with traffic: random codes, a helper a third as large as main."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        g = torch.Generator().manual_seed(0)
        config = CCEEmbeddingBagConfig(
            name="t",
            num_embeddings=shape.num_ids,
            embedding_dim=shape.dim,
            feature_names=["f"],
            num_chunks=1,
            num_rows=shape.k,
            num_helper_rows=shape.k_helper,
        )
        weight = torch.randn(shape.k + shape.k_helper, shape.dim, generator=g)
        weight[shape.k :] *= 0.3
        self.state = ChunkState(ChunkCodes(config, [0], CPU), 0, weight, {})
        self.plan = budget(shape.num_ids, shape.k, shape.k_helper, shape.dim, LIMIT)
        pairs = find_pairs(self.state, self.plan).points
        self.start = pairs.vectors(pairs.starts(shape.k))
        if shape.assign_only:
            self.start = kmeans(pairs, shape.k, 2).centroids
        self.original = self.state.ids.codes.clone()

    def reset(self) -> None:
        """The codes as they were."""
        self.state.ids.codes.copy_(self.original)

    def vectors(self) -> torch.Tensor:
        """[N, s] float32: what a peer clusters."""
        ids, k = self.state.ids, self.shape.k
        out = torch.empty(self.shape.num_ids, self.shape.dim)
        for block in ids.blocks():
            keys = ids.keys(block)
            rows = self.state.weight[k + keys % ids.helper_rows]
            out[block] = self.state.weight[keys // ids.helper_rows] + rows
        return out

    def ours(self, backend: str = "auto") -> torch.Tensor:
        """Rewrites the codes; returns the centroids."""
        engine = make_backend(backend, CPU)
        sampled = find_pairs(self.state, self.plan)
        if self.shape.assign_only:
            began = time.process_time()
            nearest = engine.prepare(sampled.points, self.start)(0, sampled.points.num_points)
            PairTable(sampled.ids, sampled.keys, nearest).write()
            self.seconds = time.process_time() - began
            return self.start
        result = kmeans(
            sampled.points, self.shape.k, self.shape.iterations, backend=backend, init=self.start
        )
        new_codes_of(sampled, result, engine).write()
        return result.centroids

    def objective(self, x: torch.Tensor, centroids: torch.Tensor) -> float:
        """Sum of squared distances to the nearest centroid, over all ids."""
        total = 0.0
        for start in range(0, len(x), 1 << 20):
            distances, _ = faiss.knn(x[start : start + (1 << 20)].numpy(), centroids.numpy(), 1)
            total += float(distances.astype("float64").clip(min=0).sum())
        return total


def by_faiss(x: torch.Tensor, shape: Shape, start: torch.Tensor) -> torch.Tensor:
    """FAISS's K-means over all vectors, and the final assignment."""
    if shape.assign_only:
        faiss.knn(x.numpy(), start.numpy(), 1)
        return start
    run = faiss.Kmeans(
        shape.dim,
        shape.k,
        niter=shape.iterations,
        max_points_per_centroid=len(x),
        min_points_per_centroid=1,
        seed=0,
    )
    run.train(x.numpy(), init_centroids=start.numpy())
    run.index.search(x.numpy(), 1)
    return torch.from_numpy(run.centroids)


def by_minibatch(x: torch.Tensor, shape: Shape, start: torch.Tensor) -> torch.Tensor:
    """scikit-learn's mini-batch K-means with its own batch size, one pass an iteration."""
    from sklearn.cluster import MiniBatchKMeans

    run = MiniBatchKMeans(
        shape.k, init=start.numpy(), n_init=1, max_iter=shape.iterations, random_state=0
    )
    run.fit(x.numpy())
    run.predict(x.numpy())
    return torch.from_numpy(run.cluster_centers_)


def peak_extra_bytes(call: Callable[[], object]) -> int | None:
    """Resident memory that `call` takes at its peak beyond what there was (Linux)."""

    def status(field: str) -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1]) * 1024
        return 0

    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # or pages freed earlier would hide the peak
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return None
    before = status("VmRSS")
    call()
    return status("VmHWM") - before


def measure(shape: Shape, repeats: int, quick: bool) -> dict[str, object]:
    """One row of the table."""
    problem = Problem(shape)
    memory = peak_extra_bytes(problem.ours)
    problem.reset()
    x = problem.vectors()
    contenders: dict[str, Callable[[], torch.Tensor]] = {
        "ours": problem.ours,
        "faiss": lambda: by_faiss(x, shape, problem.start),
    }
    if shape.num_ids <= 10**6 and shape.k <= 1024 and not shape.assign_only:
        contenders["sklearn-minibatch"] = lambda: by_minibatch(x, shape, problem.start)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    objective: dict[str, float] = {}
    for repeat in range(repeats):
        for name, call in contenders.items():
            if name == "sklearn-minibatch" and repeat:
                continue
            problem.reset()
            began = time.process_time()
            centroids = call()
            taken = time.process_time() - began
            if shape.assign_only and name == "ours":
                taken = problem.seconds
            seconds[name].append(taken)
            if name not in objective:
                objective[name] = problem.objective(x, centroids)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "shape": shape.name,
        "seconds": medians,
        "repeats": seconds,
        "faiss_over_ours": medians["faiss"] / medians["ours"],
        "goal": shape.goal,
        "objective_over_faiss": {n: v / objective["faiss"] for n, v in objective.items()},
        "peak_extra_bytes": memory,
        "computed_peak_bytes": problem.plan.working_bytes,
        "vectors_bytes": x.numel() * 4,
    }


def by_ranks(world_size: int, quick: bool) -> float:
    """Wall seconds of one shared K-means (1e6 ids, k=1024, k'=3072, s=16) on gloo ranks."""
    shape = Shape(10**5 if quick else 10**6, 1024, 3072, 16, 6)
    with tempfile.NamedTemporaryFile("r") as out:
        subprocess.run(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node"),
                *(str(world_size), "--master-port", "29611", "-m", "benchmarks.kmeans"),
                *("--rank-of", str(shape.num_ids), "--json", out.name),
            ],
            check=True,
        )
        return float(json.loads(Path(out.name).read_text()))


def one_rank(num_ids: int, out: Path) -> None:
    """What each rank of `by_ranks` runs."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    problem = Problem(Shape(num_ids, 1024, 3072, 16, 6))
    points = find_pairs(problem.state, problem.plan).points
    taken = []
    for _ in range(3):
        dist.barrier()
        began = time.perf_counter()
        kmeans(points, 1024, 6, init=problem.start, process_group=dist.group.WORLD)
        taken.append(time.perf_counter() - began)
    if dist.get_rank() == 0:
        out.write_text(json.dumps(statistics.median(taken)))
    dist.destroy_process_group()


def training_share(data: str, quick: bool) -> dict[str, float]:
    """Seconds in clustering of a GMF run on MovieLens-1M, 18 clusterings."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [
                *(sys.executable, "-m", "cce_torchrec.train", "--model", "gmf", "--dataset"),
                *("ml-1m", "--data", data, "--embedding-dim", "32", "--params-per-dim", "256"),
                *("--epochs", "2" if quick else "10", "--clusterings", "18", "--out", folder),
            ],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        summary = json.loads((Path(folder) / "summary.json").read_text())
    share = summary["clustering_seconds"] / summary["seconds"]
    keys = ("seconds", "clustering_seconds", "best_val_log_loss")
    return {"share": share, **{key: summary[key] for key in keys}}


def main() -> None:
    """Prints the table, writes JSON and plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small shapes, under a minute")
    parser.add_argument("--json", type=Path, default=Path("runs/kmeans.json"))
    parser.add_argument("--data", help="folder of MovieLens-1M, for the share of a training run")
    parser.add_argument("--rank-of", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    if args.rank_of:
        one_rank(args.rank_of, args.json)
        return
    rows = []
    print(f"{'':44}{'ours s':>9}{'FAISS s':>9}{'ratio':>7}{'goal':>6}{'objective':>11}{'MB':>7}")
    for shape in QUICK if args.quick else FULL:
        row = measure(shape, 1 if args.quick else 3, args.quick)
        rows.append(row)
        seconds, extra = row["seconds"], row["peak_extra_bytes"]
        assert isinstance(seconds, dict) and isinstance(row["objective_over_faiss"], dict)
        print(
            f"{shape.name:44}{seconds['ours']:9.3f}{seconds['faiss']:9.3f}"
            f"{row['faiss_over_ours']:7.1f}{'' if shape.goal is None else f'{shape.goal:.2g}':>6}"
            f"{row['objective_over_faiss']['ours']:11.4f}"
            f"{extra / 1e6 if isinstance(extra, int) else -1:7.0f}",
            flush=True,
        )
    ranks = {str(n): by_ranks(n, args.quick) for n in (1, 2)}
    print(f"shared K-means, k=1024, k'=3072, s=16: wall seconds by ranks {ranks}")
    share = training_share(args.data, args.quick) if args.data else None
    if share:
        print(f"MovieLens-1M, 18 clusterings: {share['share']:.1%} of the run")
    report = {
        "device": device_name(CPU),
        "cpus": os.cpu_count(),
        "threads": 1,
        "versions": {**installed_versions(), "faiss": faiss.__version__},
        "backend": make_backend("auto", CPU).name,
        "options": str(Options()),
        "rows": rows,
        "wall_seconds_by_ranks": ranks,
        "training_share": share,
    }
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(report, indent=1) + "\n")
    bars = [(str(r["shape"]), float(str(r["faiss_over_ours"])), r["goal"]) for r in rows]
    ratio_plot(bars, "FAISS seconds / ours", args.json.with_suffix(".png"))
    print(f"{args.json}, {args.json.with_suffix('.png')}")


if __name__ == "__main__":
    main()
