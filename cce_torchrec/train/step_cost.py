"""What a training step of one kind of table costs on this machine, plain and compressed.

Both are under DistributedModelParallel on one rank with a fused optimizer, as in a job, and take
turns of a few batches in one process, so that what else the machine does is the same for both.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.distributed import DistributedModelParallel
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from cce_torchrec.byte_sizes import said_bytes
from cce_torchrec.config import CCEEmbeddingBagConfig
from cce_torchrec.device_name import device_name
from cce_torchrec.distributed.process_group import end_process_group
from cce_torchrec.distributed.sharders import get_default_sharders
from cce_torchrec.modules.embedding_bag_collection import CCEEmbeddingBagCollection
from cce_torchrec.planning import make_plan
from cce_torchrec.planning.outlook import OPTIMIZERS, outlook
from cce_torchrec.train.run import start_ranks
from cce_torchrec.versions import installed_versions

_TURN = 5
"""Batches that are counted on end, after one that is not: a job runs one model, with its caches."""


@dataclass(frozen=True, kw_only=True)
class StepSetting:
    """One job: equal tables, and batches of bags of one length."""

    num_embeddings: int = 1_000_000
    embedding_dim: int = 64
    num_rows: int = 4096
    num_helper_rows: int | None = None
    num_chunks: int = 4
    tables: int = 1
    batch_size: int = 4096
    bag: int = 1
    """Ids of each bag."""
    ids: str = "uniform"
    """uniform, or zipf: the id of rank r is drawn by a density of 1 / r."""
    optimizer: str = "rowwise_adagrad"

    def __post_init__(self) -> None:
        for name in ("num_embeddings", "tables", "batch_size", "bag"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be 1 or more")
        if self.ids not in ("uniform", "zipf") or self.optimizer not in OPTIMIZERS:
            raise ValueError(f"ids {self.ids!r} or optimizer {self.optimizer!r} is unknown")

    def configs(self, kind: str) -> list[EmbeddingBagConfig]:
        """The tables, plain or CCE."""
        out: list[EmbeddingBagConfig] = []
        for i in range(self.tables):
            fields: dict[str, Any] = {
                "name": f"t{i}",
                "num_embeddings": self.num_embeddings,
                "embedding_dim": self.embedding_dim,
                "feature_names": [f"f{i}"],
            }
            if kind == "plain":
                out.append(EmbeddingBagConfig(**fields))
                continue
            fields["num_helper_rows"] = self.num_helper_rows
            out.append(
                CCEEmbeddingBagConfig(**fields, num_rows=self.num_rows, num_chunks=self.num_chunks)
            )
        return out


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """One contender."""

    milliseconds: float
    """Of a step, wall-clock: the median."""
    quartiles: tuple[float, float]
    bytes: int
    """Of codebooks and codes, or of the weights of plain tables."""
    optimizer_bytes: int


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What `step_cost` has measured; prints as sentences."""

    setting: StepSetting
    plain: StepCost
    cce: StepCost
    device: str
    threads: int
    steps: int
    """That were counted of each."""

    @property
    def ratio(self) -> float:
        """Time of a CCE step over that of a plain one."""
        return self.cce.milliseconds / self.plain.milliseconds

    def to_json(self) -> dict[str, Any]:
        """All of it with the versions, as JSON has it."""
        return asdict(self) | {"cce_over_plain": self.ratio, "versions": installed_versions()}

    def __str__(self) -> str:
        lines = [f"{self.device}, {self.threads} threads, {self.steps} steps of each, taking turns"]
        for name, own in (("plain", self.plain), ("CCE", self.cce)):
            low, high = own.quartiles
            lines.append(
                f"{name}: {own.milliseconds:.2f} ms a step (half of them {low:.2f} to {high:.2f}), "
                f"{said_bytes(own.bytes)} of tables, {said_bytes(own.optimizer_bytes)} of "
                "optimizer state"
            )
        smaller = self.plain.bytes / self.cce.bytes
        lines.append(
            f"CCE takes {self.ratio:.2f} times as long, and is {smaller:.1f} times smaller"
        )
        return "\n".join(lines)


def step_cost(setting: StepSetting, *, repeats: int = 8, threads: int = 1) -> StepReport:
    """Measures forward, backward and update of plain and CCE tables on one rank of this machine.

    On the GPU if there is one, else on the CPU. Starts and ends a process group of its own.

    Args:
        setting: of the job.
        repeats: turns of each, of 5 steps.
        threads: of torch on a CPU.

    Raises:
        ValueError: settings that no table can have, or tables that do not fit the device.
    """
    if repeats < 1 or threads < 1:
        raise ValueError(f"repeats {repeats}, threads {threads}: at least 1 of each")
    configs = {kind: setting.configs(kind) for kind in ("plain", "cce")}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    device = start_ranks(timedelta(minutes=10))
    try:
        times = _measure(setting, configs, device, repeats)
        name = device_name(device)
    finally:
        end_process_group()
        torch.set_num_threads(before)
    costs = {kind: _cost(times[kind], configs[kind], setting) for kind in configs}
    return StepReport(
        setting=setting,
        plain=costs["plain"],
        cce=costs["cce"],
        device=name,
        threads=threads,
        steps=len(times["cce"]),
    )


def _measure(
    setting: StepSetting,
    configs: dict[str, list[EmbeddingBagConfig]],
    device: torch.device,
    repeats: int,
) -> dict[str, list[float]]:
    """Seconds of each step that counts, of each contender."""
    # Both are there all the time, as a comparison of two processes would be one of two moments.
    models = {kind: _model(setting, own, device) for kind, own in configs.items()}
    times: dict[str, list[float]] = {kind: [] for kind in models}
    random = torch.Generator(device=device).manual_seed(0)
    for _ in range(repeats):
        batches = [_batch(setting, device, random) for _ in range(1 + _TURN)]
        for kind, model in models.items():
            times[kind] += [_step(model, ids, device) for ids in batches][1:]
    return times


def _model(
    setting: StepSetting, configs: Sequence[EmbeddingBagConfig], device: torch.device
) -> DistributedModelParallel:
    plain = type(configs[0]) is EmbeddingBagConfig
    # TorchRec's own collection, as a job without this package has it.
    kind: Any = EmbeddingBagCollection if plain else CCEEmbeddingBagCollection
    collection = kind(tables=list(configs), device=torch.device("meta"))
    apply_optimizer_in_backward(
        OPTIMIZERS[setting.optimizer], list(collection.parameters()), {"lr": 0.01}
    )
    model = nn.Sequential(collection)
    plan = make_plan(model, configs, device, "tw", batch_size=setting.batch_size)
    return DistributedModelParallel(
        model, device=device, plan=plan, sharders=get_default_sharders()
    )


def _batch(
    setting: StepSetting, device: torch.device, random: torch.Generator
) -> KeyedJaggedTensor:
    count = setting.batch_size * setting.bag
    total, most = count * setting.tables, setting.num_embeddings
    if setting.ids == "zipf":
        uniform = torch.rand(total, generator=random, device=device, dtype=torch.float64)
        # Hot ids are spread over the table, whose first rows would else be in one page.
        ids = ((most**uniform).long() * 2_654_435_761 % most).clamp(max=most - 1)
    else:
        ids = torch.randint(most, (total,), generator=random, device=device)
    return KeyedJaggedTensor(
        keys=[f"f{i}" for i in range(setting.tables)],
        values=ids,
        lengths=torch.full(
            (setting.batch_size * setting.tables,), setting.bag, dtype=torch.int32, device=device
        ),
        stride=setting.batch_size,
        length_per_key=[count] * setting.tables,  # as batches of TorchRec's data pipes know it
    )


def _step(model: nn.Module, ids: KeyedJaggedTensor, device: torch.device) -> float:
    """Seconds of a step, from an idle device to a done one."""
    # Without what the other contender has computed and left in it.
    own = KeyedJaggedTensor(
        ids.keys(), ids.values(), lengths=ids.lengths(), stride=ids.stride(),
        length_per_key=ids.length_per_key(),
    )  # fmt: skip
    _wait(device)
    began = time.perf_counter()
    out = model(own).values()
    # Fused optimizers update their tables within it.
    out.backward(torch.ones_like(out))
    _wait(device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _cost(
    seconds: Sequence[float], configs: Sequence[EmbeddingBagConfig], setting: StepSetting
) -> StepCost:
    # Computed, as plans compute them: within 2 % of what is allocated (docs/plans.md). Of a memory
    # without bounds, as the tables have been in the real one.
    found = outlook(configs, world_size=1, memory_bytes=1 << 60, optimizer=setting.optimizer)
    low, _, high = statistics.quantiles(seconds, n=4)
    return StepCost(
        milliseconds=1e3 * statistics.median(seconds),
        quartiles=(1e3 * low, 1e3 * high),
        bytes=sum(table.bytes for table in found.tables),
        optimizer_bytes=sum(table.optimizer_bytes for table in found.tables),
    )
