"""Plans in bytes: a report per table and rank, and tables that fit a memory budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torchrec
from torch import nn
from torchrec.distributed.planner.types import PlannerError
from torchrec.distributed.types import EnumerableShardingSpec, ShardingPlan
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from cce_torchrec.config import CCEEmbeddingBagConfig
from cce_torchrec.distributed.id_blocks import IdBlocks, is_row_wise
from cce_torchrec.distributed.plan import is_data_parallel
from cce_torchrec.distributed.sharders import get_default_sharders
from cce_torchrec.modules.compress import compressed, full_bytes
from cce_torchrec.modules.embedding_bag_collection import CCEEmbeddingBagCollection
from cce_torchrec.planner import make_planner, optimizer_bytes, row_wise_bytes


@dataclass(frozen=True)
class PlannedTable:
    """One table on one rank."""

    collection: str
    name: str
    sharding_type: str
    rank: int
    codebook_bytes: int
    """Of a plain table: its weights."""
    code_bytes: int
    """Codes, and bits of seen ids."""
    optimizer_bytes: int

    @property
    def bytes(self) -> int:
        """All of it."""
        return self.codebook_bytes + self.code_bytes + self.optimizer_bytes


@dataclass(frozen=True)
class PlanReport:
    """What each rank holds under a plan; prints as a table."""

    tables: list[PlannedTable]
    world_size: int

    def rank_bytes(self, rank: int) -> int:
        """Bytes of tables, codes and their optimizer state on `rank`."""
        return sum(table.bytes for table in self.tables if table.rank == rank)

    def __str__(self) -> str:
        header = ("table", "plan", "rank", "codebooks", "codes", "optimizer", "bytes")
        rows = [header]
        for t in self.tables:
            name = f"{t.collection}.{t.name}" if t.collection else t.name
            counts = (t.rank, t.codebook_bytes, t.code_bytes, t.optimizer_bytes, t.bytes)
            rows.append((name, t.sharding_type, *(f"{n:,}" for n in counts)))  # type: ignore[arg-type]  # mypy counts a star as one
        widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
        lines = ["  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
        totals = [f"rank {r}: {self.rank_bytes(r):,} bytes" for r in range(self.world_size)]
        return "\n".join([*lines, *totals])


def plan_report(model: nn.Module, plan: ShardingPlan, world_size: int) -> PlanReport:
    """Bytes of every table of the CCE collections of `model` on every rank under `plan`.

    Args:
        model: not sharded yet, with its optimizers applied in backward.

    Raises:
        ValueError: a collection or table that the plan does not know, a rank it should not.
    """
    out: list[PlannedTable] = []
    for path, module in model.named_modules():
        if not isinstance(module, CCEEmbeddingBagCollection):
            continue
        entries: Any = plan.get_plan_for_module(path)
        if entries is None:
            raise ValueError(f"the plan has no entry for {path!r}; it has {sorted(plan.plan)}")
        parameters = get_default_sharders()[0].shardable_parameters(module)
        for config in module.embedding_bag_configs():
            if config.name not in entries:
                raise ValueError(
                    f"table {config.name!r}: the plan of {path!r} has {sorted(entries)}"
                )
            entry, parameter = entries[config.name], parameters[config.name]
            if is_data_parallel(entry):
                out += _everywhere(path, config, entry, parameter, world_size)
            else:
                out += _planned(path, config, entry, parameter)
    for table in out:
        if table.rank >= world_size:
            raise ValueError(
                f"table {table.name!r}: the plan puts it on rank {table.rank} of {world_size}; "
                "make the plan for this number of ranks"
            )
    return PlanReport(out, world_size)


def _planned(
    path: str, config: EmbeddingBagConfig, entry: Any, parameter: nn.Parameter
) -> list[PlannedTable]:
    """A table's shares, summed by rank."""
    assert isinstance(entry.sharding_spec, EnumerableShardingSpec)
    if is_row_wise(entry) and isinstance(config, CCEEmbeddingBagConfig):
        blocks = IdBlocks.of(config, entry)
        return [
            PlannedTable(
                *(path, config.name, entry.sharding_type, rank),
                *row_wise_bytes(config, parameter, blocks, rank),
            )
            for rank in blocks.ranks
        ]
    shares: dict[int, list[int]] = {}
    for shard in entry.sharding_spec.shards:
        rows, width = shard.shard_sizes
        rank, codes = shard.placement.rank(), 0
        if isinstance(config, CCEEmbeddingBagConfig):
            codes = config.code_bytes * width // config.embedding_dim
            codes += config.seen_bytes if rank not in shares else 0  # one set of bits a rank
        size = rows * width * parameter.element_size()
        share = shares.setdefault(rank, [0, 0, 0])
        for i, n in enumerate((size, codes, optimizer_bytes(config, parameter, rows, width))):
            share[i] += n
    return [
        PlannedTable(path, config.name, entry.sharding_type, rank, *share)
        for rank, share in sorted(shares.items())
    ]


def _everywhere(
    path: str, config: EmbeddingBagConfig, entry: Any, parameter: nn.Parameter, world_size: int
) -> list[PlannedTable]:
    """A data-parallel table, whole on every rank; its optimizer is the user's and not counted."""
    size, codes = parameter.numel() * parameter.element_size(), 0
    if isinstance(config, CCEEmbeddingBagConfig):
        codes = config.code_bytes + config.seen_bytes
    kind = entry.sharding_type
    return [
        PlannedTable(path, config.name, kind, rank, size, codes, 0) for rank in range(world_size)
    ]


def tables_for_memory(
    tables: Sequence[EmbeddingBagConfig],
    memory_bytes: int,
    world_size: int,
    *,
    device: torch.device | None = None,
    kind: str = "auto",
    batch_size: int = 512,
    optimizer: type[torch.optim.Optimizer] = torchrec.optim.RowWiseAdagrad,
    min_bytes: int = 1 << 20,
    num_chunks: int = 4,
    seed: int = 0,
) -> list[EmbeddingBagConfig]:
    """`tables` with the large ones compressed just so far that a plan fits every rank.

    All are compressed by one ratio, the least at which TorchRec's planner finds a plan with
    `memory_bytes` a rank; it counts codes, optimizer state and what it reserves for the rest.

    Args:
        tables: those below `min_bytes`, those that compression would not make smaller, and CCE
            tables stay as they are.
        memory_bytes, world_size, device, kind, batch_size: see `make_planner`.
        optimizer: of the tables; its state counts.

    Raises:
        ValueError: no tables, or not even two rows a chunk fit.
    """
    if not tables or num_chunks < 1:
        raise ValueError(f"{len(tables)} tables, num_chunks {num_chunks}: at least 1 of each")
    device = device if device is not None else torch.device("cpu")
    plain = (t for t in tables if not isinstance(t, CCEEmbeddingBagConfig))
    large = {t.name for t in plain if full_bytes(t) >= min_bytes}

    def at(ratio: float) -> list[EmbeddingBagConfig]:
        return [
            compressed(t, ratio, None, num_chunks, seed)[0] if t.name in large else t
            for t in tables
        ]

    def fits(ratio: float) -> bool:
        configs = at(ratio)
        made = CCEEmbeddingBagCollection(configs, device=torch.device("meta"))
        apply_optimizer_in_backward(optimizer, list(made.parameters()), {"lr": 0.1})
        planner = make_planner(configs, world_size, device, kind, batch_size, memory_bytes)
        try:
            planner.plan(nn.ModuleDict({"tables": made}), get_default_sharders())
        except PlannerError:
            return False
        return True

    low, high = 1.0, float(max(t.num_embeddings for t in tables))
    if not fits(high):
        least = sum(t.table_bytes for t in at(high) if isinstance(t, CCEEmbeddingBagConfig))
        raise ValueError(
            f"{memory_bytes} bytes on each of {world_size} ranks do not hold {len(tables)} tables "
            f"with two rows a chunk; compressed ones alone take {least}. Use more ranks or memory, "
            "fewer chunks, or kind='cw'"
        )
    return at(low if fits(low) else _least(fits, low, high))


def _least(fits: Callable[[float], bool], low: float, high: float) -> float:
    """The least ratio that fits, within 2 %; `low` does not, `high` does."""
    while high / low > 1.02:
        middle = (low * high) ** 0.5
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high
