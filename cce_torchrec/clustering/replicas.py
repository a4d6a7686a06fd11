"""Chunks with copies on other ranks: each is clustered, so the copies must be equal before."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist

from cce_torchrec.clustering.chunk import ChunkState
from cce_torchrec.config import CCEEmbeddingBagConfig
from cce_torchrec.distributed.embedding_bag_collection import ShardedCCEEmbeddingBagCollection
from cce_torchrec.slots import physical_table

Digests = dict[tuple[str, int], int]


def check_optimizer(
    module: ShardedCCEEmbeddingBagCollection,
    config: CCEEmbeddingBagConfig,
    optimizer: torch.optim.Optimizer | None,
) -> None:
    """Refuses a data-parallel table whose parameters `optimizer` does not train.

    Raises:
        ValueError: naming the table.
    """
    if config.name not in module.data_parallel:
        return
    bags = module.embedding_bag_collection.embedding_bags
    trained = (
        {id(p) for group in optimizer.param_groups for p in group["params"]} if optimizer else ()
    )
    weights = [
        bags[physical_table(config.name, chunk)].weight for chunk in range(config.num_chunks)
    ]
    if not all(id(weight) in trained for weight in weights):
        given = "does not hold its parameters" if optimizer else "is missing"
        raise ValueError(
            f"table {config.name!r} is data-parallel and the optimizer {given}, whose state must "
            "follow the clustering; train data_parallel_parameters(model) by an optimizer and "
            "pass it as cluster(..., optimizer=)"
        )


def digests(states: Iterable[tuple[str, ChunkState]]) -> Digests:
    """A number per replicated chunk that differs if the codebook of a copy does."""
    out = {}
    for path, state in states:
        if state.replicas is not None:
            words = state.weight.detach().contiguous().view(torch.uint8).view(-1).long()
            places = torch.arange(1, len(words) + 1, device=words.device)
            out[path, state.chunk] = int((words * places).sum())
    return out


def check_equal(found: list[Digests]) -> None:
    """Refuses copies that differ from those of a lower rank; `found` is by rank.

    Raises:
        ValueError: naming table, chunk and ranks.
    """
    first: dict[tuple[str, int], tuple[int, int]] = {}
    for rank, theirs in enumerate(found):
        for key, value in theirs.items():
            owner, expected = first.setdefault(key, (rank, value))
            if value != expected:
                raise ValueError(
                    f"table {key[0]!r}, chunk {key[1]}: the codebook of rank {rank} differs from "
                    f"its copy on rank {owner}, so their codes would too; train data-parallel "
                    "tables on every rank by the same optimizer, load the same checkpoint on "
                    "every rank, and sync() 2D replicas before clustering"
                )


def share_seen(states: Iterable[tuple[str, ChunkState]]) -> None:
    """Gives every copy the ids that any rank that holds one has seen."""
    shared: set[int] = set()
    for _, state in states:
        seen = state.codes.seen
        if state.replicas is None or seen is None or id(state.codes) in shared:
            continue
        shared.add(id(state.codes))
        everyone = [torch.empty_like(seen) for _ in range(dist.get_world_size(state.replicas))]
        dist.all_gather(everyone, seen, group=state.replicas)
        for theirs in everyone:
            seen |= theirs
