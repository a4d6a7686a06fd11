"""Tables that are compressed just so far that a plan fits a memory budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torchrec
from torch import nn
from torchrec.distributed.planner import EmbeddingShardingPlanner
from torchrec.distributed.planner.types import PlannerError
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from cce_torchrec.config import is_cce
from cce_torchrec.config_checks import finite_number, whole_number
from cce_torchrec.distributed.sharders import get_default_sharders
from cce_torchrec.modules.compressed_tables import Form, made_of
from cce_torchrec.modules.compressible import full_bytes
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
    num_chunks: int | None = None,
    seed: int = 0,
    examples_per_id: Mapping[str, float] | None = None,
    joint: str = "no",
    multiplies: bool = False,
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
        num_chunks: most chunks of a table; fewer where embedding_dim asks for it. None: 4, or 8
            of rare ids, which have no codes.
        seed: of the hashes.
        examples_per_id: by table, the mean training examples of an id in one pass; see
            `compress_model`.
        joint: which tables become one; see `compress_model`. The one stands where the first of
            them stood, so that a collection of the result has another order of its output, unless
            it is told `output_order`.
        multiplies: whether the network is the product of two embeddings; see `compress_model`.

    Raises:
        ValueError: no tables, examples of one that stays as it is, or not even two rows a chunk
            fit.
    """
    ranks = whole_number("tables_for_memory", "world_size", world_size)
    if not tables or ranks < 1:
        raise ValueError(f"{len(tables)} tables, world_size {ranks}: at least 1 of each")
    finite_number("tables_for_memory", "memory_bytes", memory_bytes, 0.0)
    finite_number("tables_for_memory", "min_bytes", min_bytes)
    device = device if device is not None else torch.device("cpu")
    form = Form(
        num_chunks=num_chunks,
        seed=seed,
        examples_per_id=examples_per_id or {},
        joint=joint,
        multiplies=multiplies,
        count_codes=True,
    )
    large = {t.name for t in tables if not is_cce(t) and full_bytes(t) >= min_bytes}
    form.check_names(large)
    small = {t.name: "small, or compressed" for t in tables if t.name not in large}

    def at(ratio: float) -> list[EmbeddingBagConfig]:
        return [made.table for made in made_of(tables, small, ratio, form)]

    def fits(ratio: float) -> bool:
        configs = at(ratio)
        planner = make_planner(
            configs, world_size, device, kind, batch_size=batch_size, memory_bytes=memory_bytes
        )
        return _has_plan(planner, configs, optimizer)

    most = float(sum(t.num_embeddings for t in tables))
    if not fits(most):
        raise _too_little(at(most), memory_bytes, world_size)
    return at(_least(fits, most))


def _has_plan(
    planner: EmbeddingShardingPlanner,
    configs: Sequence[EmbeddingBagConfig],
    optimizer: type[torch.optim.Optimizer],
) -> bool:
    # On meta: the planner asks modules for shapes and optimizers, and these may be of any size.
    collection = CCEEmbeddingBagCollection(configs, device=torch.device("meta"))
    apply_optimizer_in_backward(optimizer, list(collection.parameters()), {"lr": 0.1})
    try:
        planner.plan(nn.ModuleDict({"tables": collection}), get_default_sharders())
    except PlannerError:
        return False
    return True


def _too_little(
    least: Sequence[EmbeddingBagConfig], memory_bytes: int, world_size: int
) -> ValueError:
    taken = sum(t.table_bytes for t in least if is_cce(t))
    return ValueError(
        f"{memory_bytes} bytes on each of {world_size} ranks do not hold {len(least)} tables "
        f"with two rows a chunk; compressed ones alone take {taken}. Use more ranks or memory, "
        "fewer chunks, or kind='cw'"
    )


def _least(fits: Callable[[float], bool], most: float) -> float:
    """The least ratio that fits, within 2 %; `most` does."""
    low, high = 1.0, most
    if fits(low):
        return low
    while high / low > 1.02:
        middle = (low * high) ** 0.5
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high
