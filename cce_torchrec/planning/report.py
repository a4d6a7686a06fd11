"""What each rank holds under a plan, table by table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from torchrec.distributed.types import EnumerableShardingSpec, ShardingPlan
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from cce_torchrec.config import is_cce
from cce_torchrec.distributed.id_partition import IdPartition, is_row_wise
from cce_torchrec.distributed.plan import is_data_parallel
from cce_torchrec.distributed.sharders import get_default_sharders
from cce_torchrec.modules.embedding_bag_collection import CCEEmbeddingBagCollection
from cce_torchrec.planning.storage import optimizer_bytes, row_wise_bytes


@dataclass(frozen=True, kw_only=True)
class PlannedTable:
    """One table on one rank."""

    collection: str
    name: str
    sharding_type: str
    rank: int
    codebook_bytes: int
    """Of a plain table: its weights."""
    code_bytes: int
    """Codes, and bits and counts of seen ids."""
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
        # The sharder's proxies, one [k + k', D] for each table, are what the plan was made for.
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
        # Else the totals, one for each rank there is, would leave these bytes out.
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
    if is_row_wise(entry) and is_cce(config):
        partition = IdPartition.from_plan(config, entry)
        return [
            _table(path, config, entry, rank, row_wise_bytes(config, parameter, partition, rank))
            for rank in partition.ranks
        ]
    shares: dict[int, list[int]] = {}
    for shard in entry.sharding_spec.shards:
        rows, width = shard.shard_sizes
        rank, codes = shard.placement.rank(), 0
        if is_cce(config):
            codes = config.code_bytes * width // config.embedding_dim
            # One set of bits and counts a rank.
            codes += config.notes_bytes(config.num_embeddings) if rank not in shares else 0
        size = rows * width * parameter.element_size()
        share = shares.setdefault(rank, [0, 0, 0])
        for i, n in enumerate((size, codes, optimizer_bytes(config, parameter, rows, width))):
            share[i] += n
    return [
        _table(path, config, entry, rank, (share[0], share[1], share[2]))
        for rank, share in sorted(shares.items())
    ]


def _table(
    path: str, config: EmbeddingBagConfig, entry: Any, rank: int, share: tuple[int, int, int]
) -> PlannedTable:
    """A table's share on a rank: bytes of codebooks, codes and optimizer state."""
    codebooks, codes, optimizer = share
    return PlannedTable(
        collection=path,
        name=config.name,
        sharding_type=entry.sharding_type,
        rank=rank,
        codebook_bytes=codebooks,
        code_bytes=codes,
        optimizer_bytes=optimizer,
    )


def _everywhere(
    path: str, config: EmbeddingBagConfig, entry: Any, parameter: nn.Parameter, world_size: int
) -> list[PlannedTable]:
    """A data-parallel table, whole on every rank; its optimizer is the user's and not counted."""
    size, codes = parameter.numel() * parameter.element_size(), 0
    if is_cce(config):
        codes = config.code_bytes + config.notes_bytes(config.num_embeddings)
    return [_table(path, config, entry, rank, (size, codes, 0)) for rank in range(world_size)]
