"""Tables that are compressed just so far that a plan fits a memory budget."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torchrec
from torch import nn
from torchrec.distributed.planner import EmbeddingShardingPlanner
from torchrec.distributed.planner.types import PlannerError
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from cce_torchrec.config import is_cce
from cce_torchrec.distributed.sharders import get_default_sharders
from cce_torchrec.modules.compress import compressed, full_bytes
from cce_torchrec.modules.embedding_bag_collection import CCEEmbeddingBagCollection
from cce_torchrec.planning.planner import make_planner


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
        memory_bytes: per rank, of which 15 % are left to other things than tables.
        world_size: ranks of the plan.
        device: of the plan; by default a CPU.
        kind: of the plan; see `make_planner`.
        batch_size: global.
        optimizer: of the tables; its state counts.
        min_bytes: bytes from which a table is compressed.
        num_chunks: most chunks of a table; fewer where embedding_dim asks for it.
        seed: of the hashes.

    Raises:
        ValueError: no tables, or not even two rows a chunk fit.
    """
    if not tables or num_chunks < 1:
        raise ValueError(f"{len(tables)} tables, num_chunks {num_chunks}: at least 1 of each")
    search = _Search(
        tables=tables,
        large={t.name for t in tables if not is_cce(t) and full_bytes(t) >= min_bytes},
        num_chunks=num_chunks,
        seed=seed,
        optimizer=optimizer,
        make_planner=functools.partial(
            make_planner,
            world_size=world_size,
            device=device if device is not None else torch.device("cpu"),
            kind=kind,
            batch_size=batch_size,
            memory_bytes=memory_bytes,
        ),
    )
    most = float(max(t.num_embeddings for t in tables))
    if not search.fits(most):
        least = sum(t.table_bytes for t in search.at(most) if is_cce(t))
        raise ValueError(
            f"{memory_bytes} bytes on each of {world_size} ranks do not hold {len(tables)} tables "
            f"with two rows a chunk; compressed ones alone take {least}. Use more ranks or memory, "
            "fewer chunks, or kind='cw'"
        )
    return search.at(search.least_ratio(most))


@dataclass(frozen=True, kw_only=True)
class _Search:
    """The tables at any ratio of compression, and whether a plan has room for them."""

    tables: Sequence[EmbeddingBagConfig]
    large: set[str]
    """Those that are compressed."""
    num_chunks: int
    seed: int
    optimizer: type[torch.optim.Optimizer]
    make_planner: Callable[..., EmbeddingShardingPlanner]
    """Of the configurations it is given."""

    def at(self, ratio: float) -> list[EmbeddingBagConfig]:
        """All tables, with the large ones compressed by `ratio`."""
        return [
            compressed(t, ratio, None, self.num_chunks, self.seed)[0] if t.name in self.large else t
            for t in self.tables
        ]

    def fits(self, ratio: float) -> bool:
        """Whether the planner finds a plan for the tables at `ratio`."""
        configs = self.at(ratio)
        # On meta: the planner asks modules for shapes and optimizers, and these may be any size.
        collection = CCEEmbeddingBagCollection(configs, device=torch.device("meta"))
        apply_optimizer_in_backward(self.optimizer, list(collection.parameters()), {"lr": 0.1})
        try:
            self.make_planner(configs).plan(
                nn.ModuleDict({"tables": collection}), get_default_sharders()
            )
        except PlannerError:
            return False
        return True

    def least_ratio(self, most: float) -> float:
        """The least ratio that fits, within 2 %; `most` does."""
        low, high = 1.0, most
        if self.fits(low):
            return low
        # Ratios, not differences: at 1000 a step of 1 is nothing, at 1 it halves a table.
        while high / low > 1.02:
            middle = (low * high) ** 0.5
            low, high = (low, middle) if self.fits(middle) else (middle, high)
        return high
