"""Codes spread over ranks by ids: two hops against replicated codebooks, on two gloo ranks.

python -m benchmarks.row_wise [--quick] [--json FILE]

Both fetch codes from the owners of their ids. Two hops (ROW_WISE) then send rows to the owners of
the codebooks and pooled embeddings back; replicated codebooks are looked up where the batch is and
sum their gradients over ranks. The latter is not in the package: here it is a data-parallel step,
whose codes happen to be local, plus a fetch. Table-wise is what both give up, beside it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torchrec
from torchrec.distributed import DistributedModelParallel

from benchmarks.contenders import (
    Clock,
    Setting,
    Sparse,
    batches,
    build,
    keep_freed_memory,
    step,
    tables,
)
from benchmarks.machine import device_name
from benchmarks.network import Counted
from benchmarks.ranks import start_ranks
from cce_torchrec import CCEEmbeddingBagCollection
from cce_torchrec.distributed.data_parallel import data_parallel_parameters
from cce_torchrec.distributed.process_group import end_process_group
from cce_torchrec.distributed.sharders import get_default_sharders
from cce_torchrec.planning import make_plan
from cce_torchrec.versions import installed_versions

CPU = torch.device("cpu")
SETTINGS = [
    Setting(10**7, main_rows=k, helper_rows=3 * k, batch=4096, zipf=zipf)
    for k in (1024, 4096, 16384)
    for zipf in (False, True)
]
TURNS = 5


class Contender:
    """One way to train the table, with what its steps took and sent."""

    def __init__(self, setting: Setting, plan: str) -> None:
        self.optimizer: torch.optim.Optimizer | None = None
        if plan == "dp":
            configs = tables(setting, "cce")
            model = Sparse(CCEEmbeddingBagCollection(configs))
            names = [config.name for config in configs]
            planned = make_plan(model, configs, CPU, data_parallel=names)
            self.model = DistributedModelParallel(
                model, device=CPU, plan=planned, sharders=get_default_sharders()
            )
            rows = data_parallel_parameters(self.model)
            self.optimizer = torchrec.optim.RowWiseAdagrad(rows.values(), lr=0.01)
        else:
            self.model = build(setting, "cce", CPU, "rowwise_adagrad", plan)
        self.taken: list[float] = []
        self.fetches: list[float] = []
        self.sent = 0

    def run(self, ids: Any, clock: Clock, counted: Counted) -> None:
        """One step; of ROW_WISE, also one fetch by itself."""
        dist.barrier()
        counted.bytes = 0
        taken = step(self.model, ids, clock)["step"]
        if self.optimizer is not None:
            clock.start()
            self.optimizer.step()
            self.optimizer.zero_grad()
            clock.mark("optimizer")
            taken += clock.read()["optimizer"]
        self.taken.append(taken)
        self.sent = counted.bytes
        fetch = self.model.module.collection.distribution.fetch
        if fetch is not None:
            dist.barrier()
            counted.bytes = 0
            clock.start()
            fetch.replace(ids, self.model.module.collection.bounds_check)
            clock.mark("fetch")
            self.fetches.append(clock.read()["fetch"])
            self.fetched = counted.bytes


def measure(setting: Setting, repeats: int) -> dict[str, Any]:
    """Medians of one setting, on this rank; bytes of all ranks."""
    clock, counted = Clock(CPU, wall=True), Counted()
    contenders = {name: Contender(setting, name) for name in ("tw", "rw", "dp")}
    kjts = batches(setting, CPU, repeats + TURNS, seed=dist.get_rank())
    for first in range(0, len(kjts), TURNS):
        for contender in contenders.values():
            for ids in kjts[first : first + TURNS]:
                contender.run(ids, clock, counted)
    dist.all_to_all_single = counted._real
    took = {n: statistics.median(c.taken[TURNS:]) for n, c in contenders.items()}
    two_hops = contenders["rw"]
    fetch = statistics.median(two_hops.fetches[TURNS:])
    config = tables(setting, "cce")[0]
    sent = torch.tensor([contenders["tw"].sent, two_hops.sent, two_hops.fetched])
    dist.all_reduce(sent)
    # A ring passes every gradient 2 (W - 1) / W times per rank: with two ranks, once.
    summed = config.codebook_bytes * dist.get_world_size()
    return {
        "setting": setting.name,
        "milliseconds": {
            "table-wise": took["tw"],
            "two hops": took["rw"],
            "replicated": took["dp"] + fetch,
            "fetch": fetch,
        },
        "bytes": {
            "table-wise": int(sent[0]),
            "two hops": int(sent[1]),
            "replicated": int(sent[2]) + summed,
            "fetch": int(sent[2]),
        },
        "replicated / two hops": (took["dp"] + fetch) / took["rw"],
    }


def rank_main(out: str, quick: bool) -> None:
    """One rank."""
    keep_freed_memory()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    settings = SETTINGS[:1] if quick else SETTINGS
    found = [measure(setting, TURNS if quick else 5 * TURNS) for setting in settings]
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(found))
    dist.barrier()
    end_process_group()


def main() -> None:
    """Starts the ranks, prints the table, writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rank-out", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank_out:
        rank_main(args.rank_out, args.quick)
        return
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        quick = ["--quick"] if args.quick else []
        start_ranks("benchmarks.row_wise", 2, 29657, "--rank-out", str(out), *quick)
        found = json.loads(out.read_text())
    print("| ms a step (MB sent) | table-wise | two hops | replicated | fetch | replicated / two |")
    print("| --- | --- | --- | --- | --- | --- |")
    for row in found:
        cells = [
            f"{row['milliseconds'][name]:.1f} ({row['bytes'][name] / 1e6:.2f})"
            for name in ("table-wise", "two hops", "replicated", "fetch")
        ]
        print(f"| {row['setting']} | {' | '.join(cells)} | {row['replicated / two hops']:.2f} |")
    if args.json:
        record = {
            "device": device_name(CPU), "ranks": 2, "versions": installed_versions(),
            "repeats": TURNS if args.quick else 5 * TURNS, "results": found,
        }  # fmt: skip
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
