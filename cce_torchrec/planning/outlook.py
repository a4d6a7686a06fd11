"""What tables will take, and where they will be, before there is a model or a machine for it.

Everything is made on torch's meta device, so that tables of any size and plans for GPUs need
neither memory nor a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torchrec
from torch import nn
from torchrec.distributed.planner.types import PlannerError
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from cce_torchrec.byte_sizes import said_bytes
from cce_torchrec.config import is_cce
from cce_torchrec.distributed.sharders import get_default_sharders
from cce_torchrec.modules.compressible import full_bytes
from cce_torchrec.modules.embedding_bag_collection import CCEEmbeddingBagCollection
from cce_torchrec.planning.planner import make_planner
from cce_torchrec.planning.report import PlannedTable, plan_report

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "rowwise_adagrad": torchrec.optim.RowWiseAdagrad,
    "adagrad": torch.optim.Adagrad,
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
}


@dataclass(frozen=True, kw_only=True)
class TableOutlook:
    """What one table will take; bytes are those of all ranks together."""

    name: str
    kind: str
    """plain or CCE."""
    features: list[str]
    num_embeddings: int
    embedding_dim: int
    num_chunks: int
    """1 of a plain table, whose `num_rows` are its ids."""
    num_rows: int
    num_helper_rows: int
    code_bits: int
    recipe: str | None
    codebook_bytes: int
    """Of a plain table: its weights."""
    code_bytes: int
    """Codes, and notes of ids."""
    optimizer_bytes: int
    full_bytes: int
    """Of the weights of the same table if it were a plain one."""
    sharding: str
    ranks: list[int]

    @property
    def bytes(self) -> int:
        """Codebooks and codes, without the optimizer's state."""
        return self.codebook_bytes + self.code_bytes


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """What a job's tables will take, table by table and rank by rank; prints as a table."""

    tables: list[TableOutlook]
    rank_bytes: list[int]
    """Codebooks, codes and optimizer state on each rank."""
    device: str
    memory_bytes: int | None
    """Per rank; None: TorchRec's default for CPUs."""
    batch_size: int
    optimizer: str
    plan: str

    def to_json(self) -> dict[str, Any]:
        """All of it, as JSON has it."""
        return asdict(self) | {"world_size": len(self.rank_bytes)}

    def __str__(self) -> str:
        header = ("table", "ids", "dim", "chunks", "rows", "bits", "codebooks", "codes",
                  "optimizer", "smaller", "plan", "ranks")  # fmt: skip
        rows = [header, *(_row(table) for table in self.tables)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
        lines = [
            "  ".join(
                cell.ljust(width) if at in (0, 10, 11) else cell.rjust(width)
                for at, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        size, full = (sum(getattr(t, n) for t in self.tables) for n in ("bytes", "full_bytes"))
        state = sum(table.optimizer_bytes for table in self.tables)
        lines.append(
            f"{len(self.tables)} tables: {said_bytes(size)} of codebooks and codes instead of "
            f"{said_bytes(full)} of full tables ({full / size:.1f} times), and {said_bytes(state)} "
            f"of optimizer state ({self.optimizer})"
        )
        of = "" if self.memory_bytes is None else f" of {said_bytes(self.memory_bytes)}"
        each = [f"rank {rank}: {said_bytes(own)}{of}" for rank, own in enumerate(self.rank_bytes)]
        return "\n".join([*lines, *each])


def _row(table: TableOutlook) -> tuple[str, ...]:
    rows = f"{table.num_rows:,}" + (
        f" + {table.num_helper_rows:,}" if table.num_helper_rows else ""
    )
    sizes = (table.codebook_bytes, table.code_bytes, table.optimizer_bytes)
    count = len(table.ranks)
    ranks = ",".join(map(str, table.ranks)) if count < 9 else f"{count} ranks"
    smaller = f"{table.full_bytes / table.bytes:.1f}" if table.kind == "CCE" else ""
    counts = f"{table.num_embeddings:,}", f"{table.embedding_dim:,}", str(table.num_chunks)
    bits = str(table.code_bits) if table.kind == "CCE" else ""
    return (
        table.name,
        *counts,
        rows,
        bits,
        *map(said_bytes, sizes),
        smaller,
        table.sharding,
        ranks,
    )


def outlook(
    tables: Sequence[EmbeddingBagConfig],
    *,
    world_size: int,
    device: torch.device | None = None,
    memory_bytes: int | None = None,
    batch_size: int = 512,
    optimizer: str = "rowwise_adagrad",
    kind: str = "auto",
) -> Outlook:
    """What `tables` will take on `world_size` ranks under the plan that `make_plan` would make.

    Args:
        tables: CCE and plain ones; they may be of any size.
        world_size: ranks.
        device: of the ranks, by default a CPU; one of "cuda" need not be there.
        memory_bytes: per rank, of which 15 % are left to other things than tables. GPUs need it.
        batch_size: global, by which the planner estimates times.
        optimizer: of the tables, one of `OPTIMIZERS`.
        kind: of the plan; see `make_planner`.

    Raises:
        ValueError: the tables do not fit, or an argument is not usable.
    """
    device = device if device is not None else torch.device("cpu")
    # TorchRec would ask the GPU, and there may be none here.
    if device.type == "cuda" and memory_bytes is None:
        raise ValueError("a plan of GPUs that are not there needs memory_bytes of each")
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer {optimizer!r} is none of {list(OPTIMIZERS)}")
    if world_size < 1 or batch_size < 1:
        raise ValueError(f"world_size {world_size}, batch_size {batch_size}: at least 1 of each")
    collection = CCEEmbeddingBagCollection(tables, device=torch.device("meta"))
    apply_optimizer_in_backward(OPTIMIZERS[optimizer], list(collection.parameters()), {"lr": 0.1})
    model = nn.ModuleDict({"tables": collection})
    # TorchRec asks nothing of a GPU for this but the name of its type.
    planner = make_planner(
        tables, world_size, device, kind, batch_size=batch_size, memory_bytes=memory_bytes
    )
    try:
        plan = planner.plan(model, get_default_sharders())
    except PlannerError as error:
        raise _does_not_fit(tables, world_size, memory_bytes) from error
    report = plan_report(model, plan, world_size)
    parts: dict[str, list[PlannedTable]] = {}
    # A table that is spread has a part on each of several ranks.
    for part in report.tables:
        parts.setdefault(part.name, []).append(part)
    return Outlook(
        tables=[_table(table, parts[table.name]) for table in tables],
        rank_bytes=[report.rank_bytes(rank) for rank in range(world_size)],
        device=device.type,
        memory_bytes=memory_bytes,
        batch_size=batch_size,
        optimizer=optimizer,
        plan=kind,
    )


def _table(table: EmbeddingBagConfig, parts: Sequence[PlannedTable]) -> TableOutlook:
    cce = table if is_cce(table) else None
    return TableOutlook(
        name=table.name,
        kind="CCE" if cce is not None else "plain",
        features=list(table.feature_names),
        num_embeddings=table.num_embeddings,
        embedding_dim=table.embedding_dim,
        num_chunks=cce.num_chunks if cce is not None else 1,
        num_rows=cce.num_rows if cce is not None else table.num_embeddings,
        num_helper_rows=cce.helper_rows if cce is not None else 0,
        code_bits=cce.code_bits if cce is not None else 0,
        recipe=cce.recipe if cce is not None else None,
        codebook_bytes=sum(part.codebook_bytes for part in parts),
        code_bytes=sum(part.code_bytes for part in parts),
        optimizer_bytes=sum(part.optimizer_bytes for part in parts),
        full_bytes=cce.full_bytes if cce is not None else full_bytes(table),
        sharding=parts[0].sharding_type,
        ranks=[part.rank for part in parts],
    )


def _does_not_fit(
    tables: Sequence[EmbeddingBagConfig], world_size: int, memory_bytes: int | None
) -> ValueError:
    size = sum(t.table_bytes if is_cce(t) else full_bytes(t) for t in tables)
    memory = "TorchRec's default" if memory_bytes is None else said_bytes(memory_bytes)
    return ValueError(
        f"there is no plan: {len(tables)} tables take {said_bytes(size)} without optimizer state, "
        f"and {world_size} ranks have {memory} each, of which 15 % are left to other things. Use "
        "more ranks or memory, smaller tables (tables_for_memory, `plan --fit`), or a plan that "
        "splits them"
    )
