"""How long plans of many tables take, of jobs that are simulated: ours beside TorchRec's.

python -m benchmarks.plan_time [--quick] [--json FILE]

Three contenders take turns, each in a process of its own that is ended after ten minutes, and the
seconds are of its CPU: TorchRec's planner with its own search over plain tables; `make_planner`
over the same plain tables, each whole on a rank, of which there is one plan to look at; and
`make_planner` over CCE tables with `kind="auto"`. The goal is at most twice the time of the plain
tables for 400 tables on 8 ranks.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import random
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torchrec
from torch import nn
from torchrec import EmbeddingBagCollection
from torchrec.distributed.planner import EmbeddingShardingPlanner
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from benchmarks.machine import device_name
from cce_torchrec import CCEEmbeddingBagCollection, CCEEmbeddingBagConfig
from cce_torchrec.distributed.sharders import get_default_sharders
from cce_torchrec.planning import make_planner
from cce_torchrec.versions import installed_versions

CPU = torch.device("cpu")
JOBS = [(8, 100), (8, 400), (64, 400), (256, 400), (1024, 400), (1024, 1000)]
"""Ranks and tables."""
CONTENDERS = ["TorchRec", "plain tables", "CCE tables"]
MEMORY = 1 << 40
"""Bytes of a rank: all tables fit, so that the search is for time alone."""
REPEATS = 5
"""Plans of one process, of which the median counts; fewer where they take longer than 10 s."""
LONG = 60
"""Seconds from which on a planner has one turn."""
LIMIT = 600
"""Seconds after which a planner is ended, and not asked for larger jobs."""


def tables(count: int, compressed: bool, most_ids: int = 10**7) -> list[EmbeddingBagConfig]:
    """Tables of 1,000 to `most_ids` ids and four widths, plain or CCE of 1/100 of the rows."""
    chosen = random.Random(0)
    out: list[EmbeddingBagConfig] = []
    for i in range(count):
        ids = int(10 ** chosen.uniform(3, math.log10(most_ids)))
        dim = chosen.choice([16, 32, 64, 128])
        shape: dict[str, Any] = {
            "name": f"t{i}", "num_embeddings": ids, "embedding_dim": dim, "feature_names": [f"f{i}"]
        }  # fmt: skip
        if compressed and ids > 20_000:
            out.append(CCEEmbeddingBagConfig(**shape, num_rows=ids // 100))
        else:
            out.append(EmbeddingBagConfig(**shape))
    return out


def plan(contender: str, ranks: int, count: int) -> dict[str, Any]:
    """Seconds of CPU, proposals and the plan's kinds, of one contender's planner."""
    configs = tables(count, compressed=contender == "CCE tables")
    plain = contender == "TorchRec"
    kind = EmbeddingBagCollection if plain else CCEEmbeddingBagCollection
    collection = kind(tables=configs, device=torch.device("meta"))
    apply_optimizer_in_backward(
        torchrec.optim.RowWiseAdagrad, list(collection.parameters()), {"lr": 0.1}
    )
    model = nn.ModuleDict({"sparse": collection})
    seconds: list[float] = []
    while not seconds or (len(seconds) < REPEATS and sum(seconds) < 10):
        planner = make_planner(configs, ranks, CPU, "auto", memory_bytes=MEMORY)
        if plain:
            planner = EmbeddingShardingPlanner(
                topology=planner._topology, batch_size=512 // ranks or 1
            )
        start = time.process_time()
        planner.plan(model, get_default_sharders())
        seconds.append(time.process_time() - start)
    best = planner._best_plan or []
    return {
        "seconds": statistics.median(seconds),
        "proposals": planner._num_proposals,
        "kinds": Counter(option.sharding_type for option in best),
    }


def _into(queue: Any, contender: str, ranks: int, count: int) -> None:
    queue.put(plan(contender, ranks, count))


def timed(contender: str, ranks: int, count: int, limit: float) -> dict[str, Any] | None:
    """`plan` in a process of its own; None if it takes longer than `limit` seconds."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_into, args=(queue, contender, ranks, count))
    process.start()
    process.join(limit)  # a message of this size does not wait for its reader
    if process.is_alive():
        process.kill()
        process.join()
        return None
    found: dict[str, Any] = queue.get(timeout=10)
    return found


def measure(ranks: int, count: int, turns: int, contenders: list[str]) -> dict[str, Any]:
    """One job: what each of `contenders` found, with its median seconds; None if it was ended."""
    rounds: dict[str, list[dict[str, Any] | None]] = {name: [] for name in contenders}
    for _ in range(turns):
        for runs, name in zip(rounds.values(), contenders, strict=True):
            if not runs or (runs[-1] is not None and runs[-1]["seconds"] < LONG):
                runs.append(timed(name, ranks, count, LIMIT))
    out: dict[str, Any] = {"ranks": ranks, "tables": count, **dict.fromkeys(CONTENDERS)}
    for name, runs in rounds.items():
        found = [run for run in runs if run is not None]
        if len(found) == len(runs):
            seconds = [run["seconds"] for run in found]
            out[name] = {**found[0], "seconds": statistics.median(seconds), "turns": seconds}
    return out


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    cells = [
        f"{row[name]['seconds']:.2f} s ({row[name]['proposals']:,})" if row[name] else "> 10 min"
        for name in CONTENDERS
    ]
    plain, ours = row["plain tables"], row["CCE tables"]
    ratio = f"{ours['seconds'] / plain['seconds']:.2f}" if plain and ours else ""
    return f"| {row['ranks']:,} | {row['tables']:,} | {' | '.join(cells)} | {ratio} |"


def main() -> None:
    """Prints the table, writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    print(f"| ranks | tables | {' | '.join(CONTENDERS)} | CCE / plain |")
    print("| --- | --- | --- | --- | --- | --- |")
    results: list[dict[str, Any]] = []
    record = {
        "device": device_name(CPU), "versions": installed_versions(), "turns": args.turns,
        "repeats": REPEATS, "memory_bytes": MEMORY, "limit_seconds": LIMIT, "results": results,
    }  # fmt: skip
    left = CONTENDERS
    for ranks, count in [(2, 10)] if args.quick else JOBS:
        results.append(measure(ranks, count, 1 if args.quick else args.turns, left))
        print(line(results[-1]), flush=True)
        left = [name for name in left if results[-1][name] is not None]
        if args.json:
            args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
