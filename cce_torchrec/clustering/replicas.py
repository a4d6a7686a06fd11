"""Data-parallel chunks: every rank clusters its own copy, so the copies must be equal before."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist

from cce_torchrec.clustering.chunk import ChunkState
from cce_torchrec.config import CCEEmbeddingBagConfig
from cce_torchrec.distributed.embedding_bag_collection import ShardedCCEEmbeddingBagCollection
from cce_torchrec.expand import ChunkCodes, physical_table

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
        if state.replicated:
            words = state.weight.detach().contiguous().view(torch.uint8).view(-1).long()
            places = torch.arange(1, len(words) + 1, device=words.device)
            out[path, state.chunk] = int((words * places).sum())
    return out


def check_equal(found: list[Digests]) -> None:
    """Refuses copies that differ from those of rank 0; `found` is by rank.

    Raises:
        ValueError: naming table, chunk and rank.
    """
    for rank, theirs in enumerate(found):
        for key, value in theirs.items():
            if found[0].get(key, value) != value:
                raise ValueError(
                    f"data-parallel table {key[0]!r}, chunk {key[1]}: the codebook of rank {rank} "
                    "differs from that of rank 0, so their codes would too; train it on every rank "
                    "by the same optimizer, and load the same checkpoint on every rank"
                )


def share_seen(states: Iterable[tuple[str, ChunkState]], group: dist.ProcessGroup | None) -> None:
    """Gives every copy the ids that any rank has seen."""
    if group is None:
        return
    codes: dict[int, ChunkCodes] = {id(s.codes): s.codes for _, s in states if s.replicated}
    for copy in codes.values():
        if copy.seen is not None:
            everyone = [torch.empty_like(copy.seen) for _ in range(dist.get_world_size(group))]
            dist.all_gather(everyone, copy.seen, group=group)
            for theirs in everyone:
                copy.seen |= theirs
