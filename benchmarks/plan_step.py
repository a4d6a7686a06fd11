"""`python -m benchmarks.plan_step [--json FILE]`: what a step costs under plans of both planners.

Two gloo ranks, 26 tables of 1,000 to 300,000 ids and four widths, as CCE tables beside small plain
ones and all plain, each under `make_plan` and under TorchRec's own planner with our sharders. The
four models take turns of five batches in one process a rank; figures are medians of wall time.
Data-parallel tables, which TorchRec's planner may choose, are replicated by DDP as in a job.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torchrec
from torchrec import EmbeddingBagCollection, KeyedJaggedTensor
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.types import ShardingPlan
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from benchmarks.contenders import Clock, Sparse, fresh, keep_freed_memory, step
from benchmarks.machine import device_name
from benchmarks.plan_time import tables
from benchmarks.ranks import start_ranks
from cce_torchrec import CCEEmbeddingBagCollection
from cce_torchrec.distributed.process_group import end_process_group
from cce_torchrec.distributed.sharders import get_default_sharders
from cce_torchrec.planning import make_plan
from cce_torchrec.versions import installed_versions

CPU = torch.device("cpu")
TABLES, MOST_IDS, BATCH, BAG = 26, 300_000, 2048, 2
"""`BATCH` examples of each rank, `BAG` ids a bag."""
BLOCK = 5
"""Batches of a turn, after one that is not counted."""
CONTENDERS = [
    (kind, planner) for kind in ("CCE", "plain") for planner in ("make_plan", "TorchRec's planner")
]


def build(kind: str, planner: str) -> tuple[DistributedModelParallel, ShardingPlan]:
    """One contender, and its plan."""
    configs = tables(TABLES, kind == "CCE", MOST_IDS)
    made = CCEEmbeddingBagCollection if kind == "CCE" else EmbeddingBagCollection
    collection = made(tables=configs, device=torch.device("meta"))
    apply_optimizer_in_backward(
        torchrec.optim.RowWiseAdagrad, list(collection.parameters()), {"lr": 0.01}
    )
    model = Sparse(collection)
    if planner == "make_plan":
        plan = make_plan(model, configs, CPU, batch_size=BATCH * dist.get_world_size())
    else:
        topology = Topology(world_size=dist.get_world_size(), compute_device="cpu")
        own = EmbeddingShardingPlanner(topology=topology, batch_size=BATCH)
        plan = own.collective_plan(model, get_default_sharders(), dist.group.WORLD)
    model = DistributedModelParallel(model, device=CPU, plan=plan, sharders=get_default_sharders())
    return model, plan


def batches(seed: int) -> list[KeyedJaggedTensor]:
    """A turn's batches of one rank."""
    chosen = torch.Generator().manual_seed(seed)
    configs = tables(TABLES, False, MOST_IDS)
    shape = (BATCH * BAG,)
    return [
        KeyedJaggedTensor(
            keys=[config.feature_names[0] for config in configs],
            values=torch.cat(
                [torch.randint(c.num_embeddings, shape, generator=chosen) for c in configs]
            ),
            lengths=torch.full((TABLES * BATCH,), BAG, dtype=torch.int32),
            stride=BATCH,
            length_per_key=[BATCH * BAG] * TABLES,
        )
        for _ in range(BLOCK + 1)
    ]


def measure(turns: int) -> list[dict[str, Any]]:
    """Per contender the kinds of its plan and its milliseconds."""
    models = {each: build(*each) for each in CONTENDERS}
    taken: dict[tuple[str, str], list[float]] = {each: [] for each in CONTENDERS}
    clock = Clock(CPU, wall=True)
    for turn in range(turns):
        kjts = batches(dist.get_rank() * turns + turn)
        for each, (model, _) in models.items():
            dist.barrier()
            block = [step(model, fresh(ids), clock)["step"] for ids in kjts]
            taken[each] += block[1:]
    return [
        {
            "tables": kind,
            "planner": planner,
            "kinds": Counter(
                entry.sharding_type
                for module in models[kind, planner][1].plan.values()
                for entry in module.values()
            ),
            "milliseconds": statistics.median(found),
            "quartiles": statistics.quantiles(found, n=4),
        }
        for (kind, planner), found in taken.items()
    ]


def main() -> None:
    """Starts two ranks, of which each runs this again; the first prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--json", type=Path, default=Path("runs/plan_step.json"))
    parser.add_argument("--rank", action="store_true", help="be one of the ranks")
    args = parser.parse_args()
    if not args.rank:
        options = ["--rank", "--turns", str(args.turns), "--json", str(args.json)]
        start_ranks("benchmarks.plan_step", 2, 29657, *options)
        return
    keep_freed_memory()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = measure(args.turns)
    if dist.get_rank() == 0:
        print("| tables | planner | kinds of its plan | milliseconds a step | quartiles |")
        print("| --- " * 5 + "|")
        for row in found:
            kinds = ", ".join(f"{count} {kind}" for kind, count in row["kinds"].items())
            low, _, high = row["quartiles"]
            cells = [row["tables"], row["planner"], kinds, f"{row['milliseconds']:.1f}"]
            print("| " + " | ".join([*cells, f"{low:.1f} to {high:.1f}"]) + " |", flush=True)
        record = {
            "device": device_name(CPU), "versions": installed_versions(), "turns": args.turns,
            "batch_of_a_rank": BATCH, "bag": BAG, "most_ids": MOST_IDS, "results": found,
        }  # fmt: skip
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    dist.barrier()
    end_process_group()


if __name__ == "__main__":
    main()
