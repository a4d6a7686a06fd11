"""Seconds and bytes to save, load and reshard a checkpoint, beside plain TorchRec tables.

    python -m benchmarks.checkpoint [--quick] [--json FILE]

Contenders: a CCE table through `save_checkpoint` (which fsyncs, checksums and looks for NaN), a
plain table of the same bytes and the full table through torch.distributed.checkpoint as it is.
`unchecked` saves without the look for NaN, `staged` is how long an asynchronous save holds training
up, and beside the table are the milliseconds of a step alone and while a checkpoint is written.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import shutil
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torchrec
from torch import nn
from torchrec import KeyedJaggedTensor
from torchrec.distributed import DistributedModelParallel
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from benchmarks.machine import device_name
from cce_torchrec import CCEEmbeddingBagCollection, CCEEmbeddingBagConfig
from cce_torchrec.checkpoint import load_checkpoint, save_checkpoint
from cce_torchrec.checkpoint.pending import finish_pending
from cce_torchrec.distributed.process_group import end_process_group
from cce_torchrec.distributed.sharders import get_default_sharders
from cce_torchrec.planning import make_plan
from cce_torchrec.versions import installed_versions

CPU = torch.device("cpu")
CHUNKS, ROWS = 4, 4096
KINDS = ["CCE", "plain, same bytes", "full"]


class Net(nn.Module):
    """A collection inside a model."""

    def __init__(self, collection: CCEEmbeddingBagCollection) -> None:
        super().__init__()
        self.collection = collection

    def forward(self, ids: KeyedJaggedTensor) -> torch.Tensor:
        """Pooled embeddings."""
        return self.collection(ids).values()


def table(kind: str, num_ids: int, dim: int) -> EmbeddingBagConfig:
    """The table of a contender."""
    common: dict[str, Any] = {"name": "t", "embedding_dim": dim, "feature_names": ["f"]}
    cce = CCEEmbeddingBagConfig(num_embeddings=num_ids, num_chunks=CHUNKS, num_rows=ROWS, **common)
    if kind == "CCE":
        return cce
    rows = num_ids if kind == "full" else cce.table_bytes // (4 * dim)
    return EmbeddingBagConfig(num_embeddings=rows, **common)


def build(kind: str, plan_kind: str, num_ids: int, dim: int) -> DistributedModelParallel:
    """A contender, its chunks together (tw) or spread (cw)."""
    config = table(kind, num_ids, dim)
    collection = CCEEmbeddingBagCollection([config], device=torch.device("meta"))
    apply_optimizer_in_backward(
        torchrec.optim.RowWiseAdagrad, list(collection.parameters()), {"lr": 0.01}
    )
    model = Net(collection)
    plan = make_plan(model, [config], CPU, plan_kind)
    return DistributedModelParallel(model, device=CPU, plan=plan, sharders=get_default_sharders())


def plain_state(model: DistributedModelParallel) -> dict[str, Any]:
    """Model and fused state, flat: DCP misses the dictionary of a rank without tables."""
    state = model.fused_optimizer.state_dict()["state"]
    flat = {f"{name}.{key}": v for name, of in state.items() for key, v in of.items()}
    return {**model.state_dict(), **flat}


def save(kind: str, folder: str, model: DistributedModelParallel) -> None:
    """Saves a contender in its way."""
    if kind == "CCE":
        save_checkpoint(folder, model, step=1, keep=1)
    else:
        dcp.save(plain_state(model), checkpoint_id=folder)


def load(kind: str, folder: str, model: DistributedModelParallel) -> None:
    """Loads a contender in its way."""
    if kind == "CCE":
        load_checkpoint(folder, model)
        return
    dcp.load(plain_state(model), checkpoint_id=folder)  # in place: its tensors are live


def steps_while_saving(
    folder: str, model: DistributedModelParallel, num_ids: int
) -> dict[str, Any]:
    """Milliseconds of a training step, alone and while a checkpoint is written beside it."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    lengths = torch.ones(8192, dtype=torch.int64)
    batches = [
        KeyedJaggedTensor(
            ["f"], torch.randint(num_ids, (8192,), generator=generator), lengths=lengths
        )
        for _ in range(8)
    ]
    found: dict[str, list[float]] = {"alone": [], "while saving": []}
    for number in range(200):
        beside = number >= 50  # alone first, then one asynchronous save after the other
        if number >= 50 and number % 10 == 0:
            save_checkpoint(folder, model, step=number, keep=1, blocking=False)
        began = time.perf_counter()
        model(batches[number % 8]).sum().backward()
        if number >= 10:
            found["while saving" if beside else "alone"].append(time.perf_counter() - began)
    finish_pending()
    return {name: 1e3 * statistics.median(times) for name, times in found.items()}


def seconds(call: Callable[[], None]) -> float:
    """Wall seconds until every rank is done."""
    dist.barrier()
    began = time.perf_counter()
    call()
    dist.barrier()
    return time.perf_counter() - began


def two_ranks(num_ids: int, dim: int, repeats: int, folder: str) -> dict[str, dict[str, Any]]:
    """Save, load and reshard on two ranks; seconds are medians."""
    out: dict[str, dict[str, Any]] = {}
    steps: dict[str, float] = {}
    for kind in KINDS:
        times: dict[str, list[float]] = {}
        # Plain tables are not sharded by columns here: their row-wise state would change shape.
        for saved, other in (("tw", "cw"), ("cw", "tw"))[: 2 if kind == "CCE" else 1]:
            where = f"{folder}/{kind}-{saved}"
            model = build(kind, saved, num_ids, dim)
            for _ in range(repeats):
                if dist.get_rank() == 0:
                    shutil.rmtree(where, ignore_errors=True)
                took = seconds(lambda k=kind, w=where, m=model: save(k, w, m))
                times.setdefault(f"save {saved}", []).append(took)
                took = seconds(lambda k=kind, w=where, m=model: load(k, w, m))
                times.setdefault(f"load {saved}", []).append(took)
                if kind == "CCE":
                    ways = {"unchecked": {"check_finite": False}, "staged": {"blocking": False}}
                    for name, way in ways.items():
                        took = seconds(
                            lambda s=way, w=where, m=model: save_checkpoint(
                                w, m, step=1, keep=1, **s
                            )
                        )
                        times.setdefault(f"{name} {saved}", []).append(took)
                    finish_pending()
            if kind == "CCE" and saved == "tw":
                steps = steps_while_saving(where, model, num_ids)
            if kind == "CCE":
                model = build(kind, other, num_ids, dim)
                for _ in range(repeats):
                    took = seconds(lambda k=kind, w=where, m=model: load(k, w, m))
                    times.setdefault(f"{saved} to {other}", []).append(took)
        size = sum(f.stat().st_size for f in Path(folder, f"{kind}-tw").rglob("*") if f.is_file())
        out[kind] = {
            "bytes": size,
            "seconds": {name: statistics.median(values) for name, values in times.items()},
        }
    out["CCE"]["milliseconds of a step"] = steps
    return out


def one_rank(num_ids: int, dim: int, repeats: int, folder: str) -> dict[str, float]:
    """Seconds to load on one rank what two ranks saved."""
    out = {}
    for kind in KINDS:
        model = build(kind, "tw", num_ids, dim)
        times = [seconds(lambda k=kind, m=model: load(k, f"{folder}/{k}-tw", m))
                 for _ in range(repeats)]  # fmt: skip
        out[kind] = statistics.median(times)
    return out


def _rank(rank: int, size: int, port: int, call: Callable[..., Any], args: Any, out: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    dist.init_process_group("gloo")
    result = call(*args)
    if rank == 0:
        out.put(result)
    dist.barrier()  # rank 0 holds the store that the others still speak to
    end_process_group()


def on_ranks(size: int, call: Callable[..., Any], *args: Any) -> Any:
    """`call(*args)` on `size` ranks; the result of rank 0."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = mp.get_context("spawn")
    out = context.SimpleQueue()
    ranks = [context.Process(target=_rank, args=(r, size, port, call, args, out))
             for r in range(size)]  # fmt: skip
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    if any(process.exitcode for process in ranks):
        raise RuntimeError(f"ranks ended with {[process.exitcode for process in ranks]}")
    return out.get()


def main() -> None:
    """Prints the table, writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="1e5 ids instead of 1e7")
    parser.add_argument("--json", type=Path, default=Path("runs/checkpoint.json"))
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    num_ids, dim = (100_000 if args.quick else 10_000_000), 64
    with tempfile.TemporaryDirectory() as folder:
        rows = on_ranks(2, two_ranks, num_ids, dim, args.repeats, folder)
        for kind, took in on_ranks(1, one_rank, num_ids, dim, args.repeats, folder).items():
            rows[kind]["seconds"]["2 ranks to 1"] = took
    names = list(rows["CCE"]["seconds"])
    print(f"{'seconds':20}{'MB':>10}" + "".join(f"{name:>14}" for name in names))
    for kind, row in rows.items():
        cells = "".join(
            f"{row['seconds'][n]:14.2f}" if n in row["seconds"] else f"{'-':>14}" for n in names
        )
        print(f"{kind:20}{row['bytes'] / 1e6:10.1f}{cells}")
    print(f"milliseconds of a step: {rows['CCE']['milliseconds of a step']}")
    report = {
        "device": device_name(CPU),
        "cpus": os.cpu_count(),
        "threads": 1,
        "versions": installed_versions(),
        "num_embeddings": num_ids,
        "embedding_dim": dim,
        "num_chunks": CHUNKS,
        "num_rows": ROWS,
        "num_helper_rows": 3 * ROWS,
        "optimizer": "RowWiseAdagrad",
        "repeats": args.repeats,
        "rows": rows,
    }
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
