"""`python -m benchmarks.step_time [--quick] [--json FILE]`: what a training step costs.

CCE, a plain fused table of the same N and D, a hashed table of the CCE table's bytes, the CCE
table after finalising, and a dense-gradient CCE in plain PyTorch (two nn.Embedding a chunk,
stored int64 indices, AdamW: what research code does). The first four run through
DistributedModelParallel on one rank with fused row-wise Adagrad. All are interleaved in one
process; figures are medians of wall time on one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torchrec
from torch import nn
from torchrec import EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.distributed import DistributedModelParallel
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from benchmarks.machine import device_name
from benchmarks.plots import ratio_plot
from cce_torchrec import CCEEmbeddingBagCollection, CCEEmbeddingBagConfig
from cce_torchrec.distributed.sharders import get_default_sharders
from cce_torchrec.planner import make_plan
from cce_torchrec.versions import installed_versions


@dataclass(frozen=True)
class Setting:
    """One job. `goal`: most that CCE over plain may be; None: only reported."""

    num_ids: int
    dim: int = 64
    chunks: int = 4
    main_rows: int = 4096
    helper_rows: int = 4096
    batch: int = 8192
    bag: int = 4
    tables: int = 1
    zipf: bool = False
    goal: float | None = None

    @property
    def name(self) -> str:
        """For the table and the plot."""
        kind = "Zipf" if self.zipf else "uniform"
        rows = f"{self.main_rows}+{self.helper_rows}"
        return (
            f"N={self.num_ids:.0e} D={self.dim} rows={rows} B={self.batch} bag={self.bag} "
            f"tables={self.tables} {kind}"
        )


QUICK = [Setting(10**5, batch=1024), Setting(10**5, batch=1024, zipf=True)]
CPU_SETTINGS = [
    Setting(2 * 10**7, goal=1.0),
    Setting(2 * 10**7, main_rows=2048, helper_rows=6144),
    Setting(2 * 10**7, zipf=True, goal=1.3),
    Setting(5 * 10**5, tables=26, bag=1, batch=4096, goal=1.2),
    Setting(10**5),
    Setting(10**5, dim=16),
    Setting(10**6, dim=128, bag=20, batch=1024),
]
GPU_SETTINGS = [
    Setting(10**8, dim=128, main_rows=8192, helper_rows=24576, batch=65536, bag=bag, goal=1.0)
    for bag in (1, 10)
]


class Sparse(nn.Module):
    """A model that is its embeddings."""

    def __init__(self, collection: nn.Module) -> None:
        super().__init__()
        self.collection = collection

    def forward(self, ids: KeyedJaggedTensor) -> torch.Tensor:
        """Pooled embeddings [B, sum of D]."""
        return self.collection(ids).values()


class DenseCCE(nn.Module):
    """CCE as research code has it: stored int64 indices, dense gradients of whole codebooks."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        s, width = setting, setting.dim // setting.chunks
        self.bag, self.tables = s.bag, s.tables
        self.main = nn.ModuleList(
            nn.Embedding(s.main_rows, width) for _ in range(s.tables * s.chunks)
        )
        self.helper = nn.ModuleList(
            nn.Embedding(s.helper_rows, width) for _ in range(s.tables * s.chunks)
        )
        shape = (s.tables, s.num_ids, s.chunks)
        self.register_buffer("codes", torch.randint(s.main_rows, shape))
        self.register_buffer("hashes", torch.randint(s.helper_rows, shape))

    def forward(self, ids: KeyedJaggedTensor) -> torch.Tensor:
        """Pooled embeddings [B, sum of D]."""
        out = []
        for t, own in enumerate(ids.values().view(self.tables, -1)):
            codes, hashes = self.codes[t][own], self.hashes[t][own]
            for j in range(codes.shape[1]):
                at = t * codes.shape[1] + j
                rows = self.main[at](codes[:, j]) + self.helper[at](hashes[:, j])
                out.append(rows.view(-1, self.bag, rows.shape[1]).sum(1))
        return torch.cat(out, dim=1)


def tables(setting: Setting, kind: str) -> list[EmbeddingBagConfig]:
    """The tables of one contender."""
    out: list[EmbeddingBagConfig] = []
    for t in range(setting.tables):
        common: dict[str, Any] = {
            "name": f"t{t}",
            "num_embeddings": setting.num_ids,
            "embedding_dim": setting.dim,
            "feature_names": [f"f{t}"],
        }
        cce = CCEEmbeddingBagConfig(
            num_chunks=setting.chunks,
            num_rows=setting.main_rows,
            num_helper_rows=setting.helper_rows,
            **common,
        )
        if kind == "plain":
            out.append(EmbeddingBagConfig(**common))
        elif kind == "hash":
            rows = min(setting.num_ids, cce.table_bytes // (4 * setting.dim))
            out.append(
                CCEEmbeddingBagConfig(
                    num_chunks=1, num_rows=rows, num_helper_rows=0, learned_codes=False, **common
                )
            )
        elif kind == "finalised":
            rows = setting.main_rows + setting.helper_rows
            out.append(
                CCEEmbeddingBagConfig(
                    num_chunks=setting.chunks, num_rows=rows, num_helper_rows=0, **common
                )
            )
        else:
            out.append(cce)
    return out


OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "rowwise_adagrad": torchrec.optim.RowWiseAdagrad,
    "adagrad": torch.optim.Adagrad,
    "sgd": torch.optim.SGD,
}


def build(
    setting: Setting, kind: str, device: torch.device, optimizer: str
) -> DistributedModelParallel:
    """A contender under DistributedModelParallel."""
    configs = tables(setting, kind)
    collection = CCEEmbeddingBagCollection(configs, device=torch.device("meta"))
    apply_optimizer_in_backward(OPTIMIZERS[optimizer], list(collection.parameters()), {"lr": 0.01})
    model = Sparse(collection)
    plan = make_plan(model, configs, device, "tw", setting.batch)
    return DistributedModelParallel(
        model, device=device, plan=plan, sharders=get_default_sharders()
    )


def batches(setting: Setting, device: torch.device, count: int) -> list[KeyedJaggedTensor]:
    """Ids of fixed bags, uniform or with density 1 / rank over a shuffled id space."""
    g = torch.Generator().manual_seed(0)
    out = []
    for _ in range(count):
        n = setting.tables * setting.batch * setting.bag
        ids = torch.randint(setting.num_ids, (n,), generator=g)
        if setting.zipf:
            rank = (float(setting.num_ids) ** torch.rand(n, generator=g).double()).long()
            ids = rank * 2_654_435_761 % setting.num_ids
        lengths = torch.full((setting.tables * setting.batch,), setting.bag, dtype=torch.int32)
        out.append(
            KeyedJaggedTensor(
                keys=[f"f{t}" for t in range(setting.tables)],
                values=ids.to(device),
                lengths=lengths.to(device),
                stride=setting.batch,
            )
        )
    return out


class Clock:
    """Wall milliseconds between calls, with the device's work done."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self.lap()

    def lap(self) -> float:
        """Milliseconds since the last lap."""
        if self._cuda:
            torch.cuda.synchronize()
        now = time.perf_counter()
        taken = 1e3 * (now - getattr(self, "_at", now))
        self._at = now
        return taken


def step(model: nn.Module, ids: KeyedJaggedTensor, clock: Clock) -> dict[str, float]:
    """One step: forward, backward with the fused optimizer."""
    clock.lap()
    out = model(ids)
    forward = clock.lap()
    out.backward(torch.ones_like(out))
    backward = clock.lap()
    return {"forward": forward, "backward": backward, "step": forward + backward}


def breakdown(model: DistributedModelParallel, ids: KeyedJaggedTensor, clock: Clock) -> dict:
    """Forward of a CCE collection in its parts."""
    sharded = model.module.collection
    context = sharded.create_context()
    clock.lap()
    arrived = sharded.input_dist(context, ids).wait().wait()
    parts = {"input_dist": clock.lap()}
    rows = sharded._expand(arrived)
    parts["expansion"] = clock.lap()
    pooled = sharded.embedding_bag_collection.compute(context, rows)
    parts["lookup"] = clock.lap()
    sharded.output_dist(context, pooled).wait().values()
    parts["output_dist"] = clock.lap()
    return parts


def median(rows: list[dict[str, float]]) -> dict[str, float]:
    """Medians, key by key."""
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]}


def measure(
    setting: Setting, device: torch.device, repeats: int, optimizer_name: str
) -> dict[str, Any]:
    """One row of the table."""
    kinds = ["cce", "plain", "hash", "finalised"]
    models: dict[str, nn.Module] = {
        kind: build(setting, kind, device, optimizer_name) for kind in kinds
    }
    calls: dict[str, Callable[[KeyedJaggedTensor, Clock], dict[str, float]]] = {
        kind: (lambda ids, clock, m=model: step(m, ids, clock)) for kind, model in models.items()
    }
    index_bytes = 16 * setting.num_ids * setting.chunks * setting.tables
    if index_bytes <= 4 << 30:
        dense = DenseCCE(setting).to(device)
        optimizer = torch.optim.AdamW(dense.parameters())

        def dense_step(ids: KeyedJaggedTensor, clock: Clock) -> dict[str, float]:
            taken = step(dense, ids, clock)
            optimizer.step()
            optimizer.zero_grad()
            taken["step"] += clock.lap()
            return taken

        calls["dense PyTorch"] = dense_step
    clock = Clock(device)
    taken: dict[str, list[dict[str, float]]] = {kind: [] for kind in calls}
    parts = []
    for i, ids in enumerate(batches(setting, device, repeats + 2)):
        for kind, call in calls.items():
            if kind == "dense PyTorch" and i >= 5:
                continue
            result = call(ids, clock)
            if i >= 2:
                taken[kind].append(result)
        assert isinstance(models["cce"], DistributedModelParallel)
        parts.append(breakdown(models["cce"], ids, clock))
    medians = {kind: median(rows) for kind, rows in taken.items()}
    return {
        "setting": asdict(setting),
        "name": setting.name,
        "milliseconds": medians,
        "cce_forward_parts": median(parts[2:]),
        "cce_over_plain": medians["cce"]["step"] / medians["plain"]["step"],
        "cce_over_hash": medians["cce"]["step"] / medians["hash"]["step"],
        "finalised_over_plain_forward": medians["finalised"]["forward"]
        / medians["plain"]["forward"],
        "dense_over_cce": medians["dense PyTorch"]["step"] / medians["cce"]["step"]
        if "dense PyTorch" in medians
        else None,
    }


def main() -> None:
    """Prints the table, writes JSON and plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small tables, under a minute")
    parser.add_argument("--json", type=Path, default=Path("runs/step_time.json"))
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--optimizer", choices=list(OPTIMIZERS), default="rowwise_adagrad")
    args = parser.parse_args()
    torch.set_num_threads(1)
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29655")
    dist.init_process_group("nccl" if on_gpu else "gloo", rank=0, world_size=1)
    rows = []
    print(f"{'milliseconds a step':72}{'CCE':>8}{'plain':>8}{'hash':>8}{'dense':>9}{'ratio':>7}")
    settings = QUICK if args.quick else GPU_SETTINGS if on_gpu else CPU_SETTINGS
    for setting in settings:
        row = measure(setting, device, 5 if args.quick else args.repeats, args.optimizer)
        rows.append(row)
        ms = {kind: values["step"] for kind, values in row["milliseconds"].items()}
        dense = f"{ms['dense PyTorch']:9.1f}" if "dense PyTorch" in ms else f"{'-':>9}"
        print(
            f"{setting.name:72}{ms['cce']:8.2f}{ms['plain']:8.2f}{ms['hash']:8.2f}{dense}"
            f"{row['cce_over_plain']:7.2f}  "
            + " ".join(f"{k} {v:.2f}" for k, v in row["cce_forward_parts"].items())
            + f"  finalised/plain forward {row['finalised_over_plain_forward']:.2f}",
            flush=True,
        )
    report = {
        "device": device_name(device),
        "cpus": os.cpu_count(),
        "threads": 1,
        "versions": installed_versions(),
        "repeats": args.repeats,
        "optimizer": args.optimizer,
        "rows": rows,
    }
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(report, indent=1) + "\n")
    bars = [(row["name"], row["cce_over_plain"], row["setting"]["goal"]) for row in rows]
    ratio_plot(bars, "CCE step / plain fused step", args.json.with_suffix(".png"))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
