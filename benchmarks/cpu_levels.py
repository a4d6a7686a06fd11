"""`python -m benchmarks.cpu_levels [--quick] [--json FILE]`: the compiled kernels at each level.

One process loads the libraries of all levels that the processor runs (cce_torchrec/cpu_level.py),
which take turns on the same inputs. Milliseconds of CPU of a call on one thread, medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.machine import device_name
from cce_torchrec import compiled
from cce_torchrec.codes.hashing import HashFunction
from cce_torchrec.cpu_level import LEVELS, VARIABLE, highest_level
from cce_torchrec.kmeans import native as kmeans
from cce_torchrec.kmeans.sources import Sources
from cce_torchrec.lookup import backward  # noqa: F401  # which registers its operator
from cce_torchrec.lookup import native as lookup
from cce_torchrec.packing import CodePacking
from cce_torchrec.versions import installed_versions

Call = Callable[[], object]


def forget() -> None:
    """Has the next call load the libraries anew."""
    for cached in (compiled.library, kmeans.kernels, lookup.kernels):
        cached.cache_clear()


@contextmanager
def at_level(level: str) -> Iterator[None]:
    """Inside, the compiled kernels are those of `level`."""
    with mock.patch.dict(os.environ, {VARIABLE: level}):
        forget()
        yield
    forget()


def expansion(num_ids: int, bits: int) -> Call:
    """Rows of ids of one table of 10^6 with 4 chunks and helpers, ids read at random."""
    table, rows = 10**6, 1 << bits
    codes = CodePacking(bits).pack(torch.randint(rows, (table, 4), dtype=torch.int32))
    chunks = torch.randint(1 << 62, (4, 5)) | 1
    chunks[:, 0] = torch.arange(4)
    ids, out = torch.randint(table, (num_ids,)), torch.empty(8 * num_ids, dtype=torch.int64)
    job = lookup.Job(ids, table, out, chunks, codes, bits, rows, 3 * rows)
    return lambda: lookup.expand([job])


def rowwise_adagrad(dim: int) -> Call:
    """The backward of 16 codebooks of 8192 rows, 2048 bags of two rows each."""
    tables, rows, bags = 16, 8192, 2048
    weights = [torch.rand(rows, dim) for _ in range(tables)]
    states = [torch.rand(rows) for _ in range(tables)]
    indices = torch.randint(rows, (tables * bags * 2,))
    offsets = torch.arange(0, len(indices) + 1, 2)
    grad = torch.rand(bags, tables * dim)
    call = torch.ops.cce_torchrec.rowwise_adagrad.default
    owners = [1] * tables
    return lambda: call(weights, states, owners, grad, indices, offsets, None, 0.1, 1e-8)


def pairs(num_pairs: int, dim: int) -> Sources:
    """Pairs of 1024 main and 3072 helper rows in fixed point, sorted."""
    keys = torch.randint(1024 * 3072, (num_pairs,)).sort().values
    books = [torch.randint(1 << 20, (rows, dim), dtype=torch.int32) for rows in (1024, 3072)]
    return Sources(*books, (keys // 3072).int(), (keys % 3072).int())


def nearest_sums(k: int) -> Call:
    """Nearest of k centroids to 65,536 pairs by sums of two scores."""
    points = pairs(65536, 8)
    assert points.helper is not None and points.a is not None and points.b is not None
    scorer = kmeans.PairScorer(points.main.float(), points.helper.float(), k)
    scorer.score(points.main[torch.randperm(1024)[torch.arange(k) % 1024]].float())
    a, b = points.a, points.b
    return lambda: scorer.nearest(a, b)


def nearest_points(dim: int, k: int) -> Call:
    """Nearest of k centroids to 8,192 vectors by direct products."""
    scorer, x = kmeans.PointScorer(torch.rand(k, dim)), torch.rand(8192, dim)
    return lambda: scorer.of_vectors(x)


def accumulate(dim: int) -> Call:
    """Sums, sizes and errors of 65,536 pairs in 1024 clusters."""
    points, k = pairs(65536, dim), 1024
    nearest, weights = torch.randint(k, (65536,), dtype=torch.int32), torch.ones(65536).long()
    stats = tuple(torch.zeros(k, *tail, dtype=torch.int64) for tail in ((dim,), (), ()))
    return lambda: kmeans.accumulate(
        points, weights=weights, nearest=nearest, centroids=torch.rand(k, dim), scale=2.0**20,
        error_scale=1e6, stats=stats,  # type: ignore[arg-type]  # three of them
    )  # fmt: skip


def count_pairs(num_ids: int) -> Call:
    """Ids of a chunk with 1024 and 3072 rows counted by pairs."""
    packing = CodePacking(10)
    codes = packing.pack(torch.randint(1024, (num_ids, 4), dtype=torch.int32))
    column = kmeans.Column(codes=codes, packing=packing, column=1, first=0, last=num_ids)
    counts, hashed = torch.zeros(1024 * 3072, dtype=torch.int64), HashFunction(2**61 + 1, 12345)
    return lambda: column.count_pairs(hashed, 3072, None, counts)


def cases(quick: bool) -> dict[str, Call]:
    """What is measured, by the names of its rows."""
    ids = 4096 if quick else 65536
    return {
        f"expansion, {ids:,} ids, 4 chunks of 10 bits": expansion(ids, 10),
        f"expansion, {ids:,} ids, 4 chunks of 16 bits": expansion(ids, 16),
        "backward, width 8": rowwise_adagrad(8),
        "backward, width 16": rowwise_adagrad(16),
        "backward, width 64": rowwise_adagrad(64),
        "nearest of 128 by sums of scores": nearest_sums(128),
        "nearest of 1,024 by sums of scores": nearest_sums(1024),
        "nearest of 1,024, width 8": nearest_points(8, 1024),
        "nearest of 1,024, width 32": nearest_points(32, 1024),
        "nearest of 4,096, width 16": nearest_points(16, 4096),
        "sums of clusters, width 16": accumulate(16),
        f"pairs of {4 * ids:,} ids counted": count_pairs(4 * ids),
    }


def measure(calls: dict[str, Call], levels: tuple[str, ...], turns: int) -> list[dict[str, Any]]:
    """Milliseconds of each call at each level; of all turns the first is not counted."""
    taken: dict[tuple[str, str], list[float]] = {}
    for name, call in calls.items():
        for turn in range(turns + 1):
            for level in levels:
                with at_level(level):
                    call()  # which loads the library
                    began = time.process_time()
                    call()
                    if turn:
                        seconds = time.process_time() - began
                        taken.setdefault((name, level), []).append(1e3 * seconds)
    return [
        {"name": name, **{level: statistics.median(taken[name, level]) for level in levels}}
        for name in calls
    ]


def main() -> None:
    """Prints the table, writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few ids and turns")
    parser.add_argument("--turns", type=int, default=31)
    parser.add_argument("--json", type=Path, default=Path("runs/cpu_levels.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    levels = LEVELS[: LEVELS.index(highest_level()) + 1]
    turns = 2 if args.quick else args.turns
    rows = measure(cases(args.quick), levels, turns)
    print(f"| milliseconds | {' | '.join(levels)} |\n| --- |{' --- |' * len(levels)}")
    for row in rows:
        print(f"| {row['name']} | {' | '.join(f'{row[level]:.3g}' for level in levels)} |")
    report = {
        "device": device_name(torch.device("cpu")),
        "versions": installed_versions(),
        "turns": turns,
        "rows": rows,
    }
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
