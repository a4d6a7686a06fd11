"""How much memory a clustering step may take and takes, agreed on by all ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from cce_torchrec.clustering.chunk_state import ChunkState
from cce_torchrec.clustering.plan import DEFAULT_MEMORY_LIMIT, Plan
from cce_torchrec.clustering.task import ChunkKey
from cce_torchrec.collectives import agree, gather, raise_failures
from cce_torchrec.gpu.memory import free_bytes


def memory(
    plan: Plan,
    states: list[tuple[str, ChunkState]],
    memory_limit: int | None,
    whose: str | None,
    group: dist.ProcessGroup | None,
) -> tuple[int, set[ChunkKey]]:
    """Most bytes beside the model on this rank, and the chunks of all ranks whose codes wait.

    Raises:
        ValueError: on every rank, if a rank needs more than its limit.
    """
    codes = {id(s.codes): s.codes.codes for _, s in states}
    code_bytes = sum(c.numel() * c.element_size() for c in codes.values() if c is not None)
    limit = memory_limit
    if limit is None:
        limit = max(DEFAULT_MEMORY_LIMIT, code_bytes // 10)
    peak, kept = plan.memory(limit)
    failure = None
    if peak > limit:
        failure = (
            f"clustering needs up to {peak} bytes beside the model and memory_limit is {limit}"
            + (f", {whose}; free some" if whose else "; raise it")
            + ", or lower samples_per_centroid"
        )
    # Ranks that solve a chunk together keep its codes together, or find them again together: those
    # of a shared chunk as its owner has room, those of a ROW_WISE one if every rank has.
    dropped = [key for key in plan.row_wise if key not in kept]
    by_rank = gather((failure, kept, dropped), group)
    raise_failures([failure for failure, *_ in by_rank])
    shared = {key for _, keys, _ in by_rank for key in keys} & set(plan.common)
    return peak, {*kept, *shared} - {key for *_, keys in by_rank for key in keys}


def free_share(model: nn.Module) -> int | None:
    """Half of what is free on this rank's GPU; None on a CPU."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return free_bytes(device) // 2 if device.type == "cuda" else None


def least_free_share(model: nn.Module, group: dist.ProcessGroup | None) -> int | None:
    """The least of the ranks' free shares: they plan alike only under the same limit.

    Raises:
        ValueError: on every rank, if a driver does not answer.
    """
    _, everyone = agree(lambda: (None, free_share(model)), group)
    return min((share for share in everyone if share is not None), default=None)
