"""What benchmarks.step_time compares: settings, batches, models, and one step of each."""

from __future__ import annotations

import ctypes
import ctypes.util
import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torchrec
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.distributed import DistributedModelParallel
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from cce_torchrec import CCEEmbeddingBagCollection, CCEEmbeddingBagConfig
from cce_torchrec.distributed.sharders import get_default_sharders
from cce_torchrec.planning import make_plan


@dataclass(frozen=True)
class Setting:
    """One job. `goal`: most that CCE over plain may be; None: only reported.

    Zipf: the id of rank r has a density of 1 / r, over a shuffled id space.
    """

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


def tables(
    setting: Setting, kind: str, options: Mapping[str, Any] | None = None
) -> list[EmbeddingBagConfig]:
    """The tables of one contender; `options`: of the CCE tables (hash_ids, say)."""
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
            **(options or {}),
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
        elif kind == "finalized":
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
    "adam": torch.optim.Adam,  # FBGEMM has it on GPUs only
}


def build(
    setting: Setting,
    kind: str,
    device: torch.device,
    optimizer: str,
    plan_kind: str = "tw",
    options: Mapping[str, Any] | None = None,
) -> DistributedModelParallel:
    """A contender under DistributedModelParallel; "plain" is TorchRec's own collection.

    Tables are made on `device`, where they are filled: 51 GB of them never pass the host.
    """
    configs = tables(setting, kind, options)
    made = EmbeddingBagCollection if kind == "plain" else CCEEmbeddingBagCollection
    collection = made(tables=configs, device=torch.device("meta"))
    apply_optimizer_in_backward(OPTIMIZERS[optimizer], list(collection.parameters()), {"lr": 0.01})
    model = Sparse(collection)
    plan = make_plan(model, configs, device, plan_kind, batch_size=setting.batch)
    kernels = {part.compute_kernel for module in plan.plan.values() for part in module.values()}
    if kernels != {"fused"}:  # in unified memory, say
        raise ValueError(f"{setting.name}, {kind}: the planner chose kernels {kernels}, not fused")
    return DistributedModelParallel(
        model, device=device, plan=plan, sharders=get_default_sharders()
    )


def batches(
    setting: Setting, device: torch.device, count: int, seed: int = 0
) -> list[KeyedJaggedTensor]:
    """Ids of fixed bags, made on `device`."""
    g = torch.Generator(device=device).manual_seed(seed)
    out = []
    for _ in range(count):
        n = setting.tables * setting.batch * setting.bag
        if setting.zipf:
            uniform = torch.rand(n, generator=g, device=device).double()
            ids = shuffled((float(setting.num_ids) ** uniform).long(), setting.num_ids)
        else:
            ids = torch.randint(setting.num_ids, (n,), generator=g, device=device)
        out.append(keyed(setting, ids))
    return out


def shuffled(ranks: torch.Tensor, num_ids: int) -> torch.Tensor:
    """Ids of `ranks`, spread over the id space; one to one if `num_ids` is a power of ten."""
    return ranks * 2_654_435_761 % num_ids


def keyed(setting: Setting, ids: torch.Tensor) -> KeyedJaggedTensor:
    """A batch of fixed bags of `ids`, table after table.

    It knows its `length_per_key`, as batches of TorchRec's own data pipes do.
    """
    lengths = torch.full(
        (setting.tables * setting.batch,), setting.bag, dtype=torch.int32, device=ids.device
    )
    return KeyedJaggedTensor(
        keys=[f"f{t}" for t in range(setting.tables)],
        values=ids,
        lengths=lengths,
        stride=setting.batch,
        length_per_key=[setting.batch * setting.bag] * setting.tables,
    )


def fresh(ids: KeyedJaggedTensor, counted: bool = True) -> KeyedJaggedTensor:
    """The same batch without what the contender before has computed and left in it.

    `counted`: whether it keeps its `length_per_key`.
    """
    return KeyedJaggedTensor(
        keys=ids.keys(),
        values=ids.values(),
        lengths=ids.lengths(),
        stride=ids.stride(),
        length_per_key=ids.length_per_key() if counted else None,
    )


class Clock:
    """Milliseconds of the parts of a step: `start`, a `mark` where each part ends, `read`.

    On a CPU of this process's own time: a step on one thread never waits, so that this is what a
    quiet machine would show. On a GPU between events on its stream, from idle to done; within a
    step nothing waits for the device that would not in a job.
    """

    def __init__(self, device: torch.device, wall: bool = False) -> None:
        self._cuda = device.type == "cuda"
        self._now = time.perf_counter if wall else time.process_time
        self._marks: list[tuple[str, Any]] = []

    def start(self) -> None:
        """The first part begins."""
        if self._cuda:
            torch.cuda.synchronize()
        self._marks = []
        self.mark("")

    def mark(self, part: str) -> None:
        """The end of `part`."""
        at = torch.cuda.Event(enable_timing=True) if self._cuda else self._now()
        if self._cuda:
            at.record()
        self._marks.append((part, at))

    def read(self) -> dict[str, float]:
        """Milliseconds of every part since `start`."""
        if self._cuda:
            torch.cuda.synchronize()
        return {
            part: before.elapsed_time(at) if self._cuda else 1e3 * (at - before)
            for (_, before), (part, at) in itertools.pairwise(self._marks)
        }


def _run(model: nn.Module, ids: KeyedJaggedTensor, clock: Clock) -> None:
    clock.start()
    out = model(ids)
    clock.mark("forward")
    out.backward(torch.ones_like(out))
    clock.mark("backward")


def step(model: nn.Module, ids: KeyedJaggedTensor, clock: Clock) -> dict[str, float]:
    """One step: forward, backward with the fused optimizer."""
    _run(model, ids, clock)
    return _with_sum(clock.read())


def _with_sum(parts: dict[str, float]) -> dict[str, float]:
    return {**parts, "step": sum(parts.values())}


def keep_freed_memory() -> None:
    """Lets glibc keep what is freed, as the allocators of production jobs do.

    Otherwise each large tensor of a step is mapped anew, and page faults are up to half of it.
    """
    libc = ctypes.CDLL(ctypes.util.find_library("c"))
    if hasattr(libc, "mallopt"):
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


Step = Callable[[KeyedJaggedTensor, Clock], dict[str, float]]


def fused_step(model: nn.Module) -> Step:
    """A step whose optimizer runs in backward."""
    return lambda ids, clock: step(model, ids, clock)


def dense_step(setting: Setting, device: torch.device) -> Step:
    """A step of `DenseCCE` with AdamW."""
    with device:
        model = DenseCCE(setting)
    optimizer = torch.optim.AdamW(model.parameters())

    def run(ids: KeyedJaggedTensor, clock: Clock) -> dict[str, float]:
        _run(model, ids, clock)
        optimizer.step()
        optimizer.zero_grad()
        clock.mark("optimizer")
        return _with_sum(clock.read())

    return run
