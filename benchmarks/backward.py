"""`python -m benchmarks.backward [--json FILE]`: FBGEMM's backward on a CPU against ours.

Bare FBGEMM modules with random rows and row-wise Adagrad; both have the same weights and batches
and take turns. Milliseconds of forward and of backward, medians. Limits of size are lifted, so
that the rows show where they should be.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import (
    BoundsCheckMode,
    EmbeddingLocation,
)
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)

from benchmarks.contenders import keep_freed_memory
from benchmarks.machine import device_name
from cce_torchrec.lookup import backward
from cce_torchrec.versions import installed_versions


@dataclass(frozen=True)
class Shape:
    """Tables of one module, and what a batch reads of each."""

    tables: int
    rows: int
    dim: int
    bags: int
    bag: int

    @property
    def name(self) -> str:
        """For the table."""
        return f"{self.tables} x {self.rows:,} x {self.dim}, {self.bags:,} of {self.bag}"

    @property
    def lookups_per_row(self) -> float:
        """Of a batch."""
        return self.bags * self.bag / self.rows


SHAPES = [
    Shape(104, 8192, 16, 4096, 2),
    Shape(104, 8192, 16, 512, 2),
    Shape(4, 8192, 16, 8192, 8),
    Shape(4, 8192, 32, 8192, 8),
    Shape(4, 65536, 16, 8192, 8),
    Shape(4, 65536, 16, 4096, 2),
    Shape(4, 16384, 64, 4096, 4),
    Shape(4, 65536, 64, 8192, 8),
]


def measure(shape: Shape, repeats: int) -> dict[str, Any]:
    """Milliseconds of one shape."""
    spec = (shape.rows, shape.dim, EmbeddingLocation.HOST, ComputeDevice.CPU)
    theirs = SplitTableBatchedEmbeddingBagsCodegen(
        [spec] * shape.tables,
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        bounds_check_mode=BoundsCheckMode.NONE,
    )
    theirs.init_embedding_weights_uniform(-0.1, 0.1)
    ours = copy.deepcopy(theirs)
    backward.take_over(ours)
    if type(ours) is not backward.CodebookBags:
        raise ValueError("the compiled backward was not built; install a C++ compiler")
    modules = {"fbgemm": theirs, "ours": ours}
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in modules}
    per_table = shape.bags * shape.bag
    offsets = torch.arange(0, shape.tables * per_table + 1, shape.bag)
    for _ in range(repeats):
        rows = torch.randint(shape.rows, (shape.tables * per_table,))
        grad = torch.randn(shape.bags, shape.tables * shape.dim)
        for name, module in modules.items():
            began = time.process_time()
            out = module(rows, offsets)
            half = time.process_time()
            out.backward(grad)
            taken[name].append((1e3 * (half - began), 1e3 * (time.process_time() - half)))
    result: dict[str, Any] = {"shape": asdict(shape), "lookups_per_row": shape.lookups_per_row}
    for name, times in taken.items():
        forward, back = (statistics.median(t) for t in zip(*times[1:], strict=True))
        result[name] = {"forward": forward, "backward": back}
    return result


def main() -> None:
    """Prints the table, writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=26)
    parser.add_argument("--json", type=Path, default=Path("runs/backward.json"))
    args = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    report: dict[str, Any] = {
        "device": device_name(torch.device("cpu")),
        "versions": installed_versions(),
        "repeats": args.repeats,
        "rows": [],
    }
    print("| tables x rows x width, bags of rows | lookups / rows | FBGEMM | ours |")
    print("| --- | --- | --- | --- |", flush=True)
    with mock.patch.multiple(backward, MAX_BYTES=1 << 62, ROWS_PER_LOOKUP=1 << 30):
        for shape in SHAPES:
            row = measure(shape, args.repeats)
            report["rows"].append(row)
            times = " | ".join(f"{row[name]['backward']:.2g}" for name in ("fbgemm", "ours"))
            print(f"| {shape.name} | {shape.lookups_per_row:.2g} | {times} |", flush=True)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
