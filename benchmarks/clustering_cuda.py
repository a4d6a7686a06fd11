"""`python -m benchmarks.clustering_cuda [--quick] [--json FILE]`: the clustering step on a GPU.

One chunk a table, by each backend from the same state: seconds until the device is done, the
objective against torch's, and the most memory beside the model, allocated and as computed before
the step. It needs neither FAISS nor a process group. On a CPU it compares torch with `auto`.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import device_name
from cce_torchrec import CCEEmbeddingBagCollection, CCEEmbeddingBagConfig
from cce_torchrec.clustering import cluster
from cce_torchrec.versions import installed_versions


@dataclass(frozen=True)
class Shape:
    """A chunk of width `dim`, its ids, and the rows of its codebooks."""

    num_ids: int
    main_rows: int
    helper_rows: int
    dim: int

    @property
    def name(self) -> str:
        """For the table."""
        return f"N={self.num_ids:.0e} k={self.main_rows} k'={self.helper_rows} s={self.dim}"


QUICK = [Shape(10**5, 256, 768, 16)]
FULL = [
    *(Shape(10**7, 1024, 3072, dim) for dim in (4, 16, 64)),
    Shape(10**7, 4096, 12288, 32),
    Shape(10**8, 8192, 24576, 32),
]
"""The last is a chunk of the GPU rows of benchmarks.step_time."""


def build(shape: Shape, device: torch.device) -> CCEEmbeddingBagCollection:
    """A table of one chunk with random codebooks."""
    torch.manual_seed(0)
    config = CCEEmbeddingBagConfig(
        name="t",
        num_embeddings=shape.num_ids,
        embedding_dim=shape.dim,
        feature_names=["f"],
        num_chunks=1,
        num_rows=shape.main_rows,
        num_helper_rows=shape.helper_rows,
    )
    return CCEEmbeddingBagCollection([config], device=device)


def measure(shape: Shape, backend: str, device: torch.device) -> dict[str, Any]:
    """One clustering, after one of a small table that compiles what is compiled."""
    on_gpu = device.type == "cuda"
    cluster(build(Shape(10**5, 64, 64, shape.dim), device), backend=backend)
    module = build(shape, device)
    held = 0
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    began = time.perf_counter()
    report = cluster(module, backend=backend)
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    (chunk,) = report.chunks
    return {
        "seconds": seconds,
        "objective": chunk.objective_after,
        "computed_bytes": report.peak_bytes,
        "allocated_bytes": torch.cuda.max_memory_allocated() - held if on_gpu else None,
    }


def main() -> None:
    """Prints the table, writes JSON after every row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one small shape")
    parser.add_argument("--json", type=Path, default=Path("runs/clustering_cuda.json"))
    args = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    report: dict[str, Any] = {
        "device": device_name(device),
        "versions": installed_versions(),
        "rows": [],
    }
    print(f"{'':36}{'backend':>9}{'s':>9}{'objective':>11}{'MB':>8}{'computed':>9}", flush=True)
    for shape in QUICK if args.quick else FULL:
        found: dict[str, dict[str, Any]] = {}
        for backend in ("torch", "triton" if on_gpu else "auto"):
            row = found[backend] = measure(shape, backend, device)
            ratio = row["objective"] / found["torch"]["objective"]
            used = (row["allocated_bytes"] or 0) / 1e6
            print(f"{shape.name:36}{backend:>9}{row['seconds']:9.3f}{ratio:11.4f}{used:8.0f}"
                  f"{row['computed_bytes'] / 1e6:9.0f}", flush=True)  # fmt: skip
        report["rows"].append({"shape": asdict(shape), "name": shape.name, "backends": found})
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
