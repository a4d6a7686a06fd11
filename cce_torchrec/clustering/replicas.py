"""Chunks with copies on other ranks: each is clustered, so the copies must be equal before."""

from __future__ import annotations

import zlib
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn

from cce_torchrec.clustering.chunk_state import ChunkState
from cce_torchrec.clustering.options import Options
from cce_torchrec.codes.chunk_codes import codes_of
from cce_torchrec.codes.counts import LEVELS, together
from cce_torchrec.config import CCEEmbeddingBagConfig
from cce_torchrec.distributed.embedding_bag_collection import ShardedCCEEmbeddingBagCollection
from cce_torchrec.table import physical_table
from cce_torchrec.torchrec_internals import optimizers_in_backward

Digests = dict[tuple[str, int], int]


def check_optimizer(
    module: nn.Module,
    config: CCEEmbeddingBagConfig,
    optimizer: torch.optim.Optimizer | None,
) -> None:
    """Refuses a table without a fused optimizer or one in backward that `optimizer` does not train.

    Of unsharded tables only where it is given: they may be trained by nothing.

    Raises:
        ValueError: naming the table.
    """
    if isinstance(module, ShardedCCEEmbeddingBagCollection):
        kind, parameters = "data-parallel", "data_parallel_parameters(model)"
        is_asked = config.name in module.data_parallel
    else:
        kind, parameters, is_asked = "unsharded", "its parameters", optimizer is not None
    if not is_asked:
        return
    groups = optimizer.param_groups if optimizer else []
    trained = {id(p) for group in groups for p in group["params"]}
    for chunk in range(config.num_chunks):
        name = physical_table(config.name, chunk)
        weight = module.get_parameter(f"embedding_bag_collection.embedding_bags.{name}.weight")
        if id(weight) in trained or (kind == "unsharded" and optimizers_in_backward(weight)):
            continue
        given = "does not hold its parameters" if optimizer else "is missing"
        raise ValueError(
            f"table {config.name!r} is {kind} and the optimizer {given}, whose state must follow "
            f"the clustering; train {parameters} by an optimizer and pass it as "
            "cluster(..., optimizer=)"
        )


def digests(states: Iterable[tuple[str, ChunkState]], options: Options) -> Digests:
    """A number per replicated chunk that differs where its clustering would.

    Of the codebook, the optimizer's state, the clusterings so far, and what weighs its ids.
    """
    out = {}
    for path, state in states:
        if state.replicas is None:
            continue
        parts = [state.weight, *(value for _, value in sorted(state.optimizer_state.items()))]
        weights = options.weights_of(state)
        if weights is not None and not weights.bits:  # seen ids are shared afterwards
            parts.append(weights.values)
        config = state.codes.config
        metric = options.metric_of(config.name, state.chunk, config.chunk_dim)
        # Whether vectors are shrunk follows from the batches that the copy has seen.
        number = state.codes.num_clusterings * LEVELS + state.levels
        for part in parts if metric is None else [*parts, metric]:
            # Of bytes, not of values: rows that differ by a rounding cluster apart sooner or later.
            values = part.detach().contiguous().cpu().view(-1).view(torch.uint8)
            number = zlib.crc32(values.numpy().tobytes(), number)
        out[path, state.chunk] = number
    return out


def check_equal(found: list[Digests]) -> None:
    """Refuses copies that differ from those of a lower rank; `found` is by rank.

    Raises:
        ValueError: naming table, chunk and ranks.
    """
    first: dict[tuple[str, int], tuple[int, int]] = {}
    for rank, digests_of_rank in enumerate(found):
        for key, value in digests_of_rank.items():
            owner, expected = first.setdefault(key, (rank, value))
            if value != expected:
                raise ValueError(
                    f"table {key[0]!r}, chunk {key[1]}: the copy on rank {rank} differs from "
                    f"that on rank {owner} (codebook, optimizer state or options), so their codes "
                    "would too; train data-parallel "
                    "tables on every rank by the same optimizer, load the same checkpoint on "
                    "every rank, and sync() 2D replicas before clustering"
                )


def share_notes(model: nn.Module) -> None:
    """Gives every copy what any rank that holds one has noted of ids; collective."""
    for module in model.modules():
        if not isinstance(module, ShardedCCEEmbeddingBagCollection):
            continue
        for name, group in sorted(module.replica_groups().items()):
            codes = codes_of(module.codes, name)
            if codes is None:
                continue
            # Gathered, because NCCL has no reduction by a bitwise or.
            if codes.seen is not None:
                for seen in _of_all(codes.seen, group):
                    codes.seen |= seen
            if codes.counts is not None:
                codes.counts.copy_(together(_of_all(codes.counts, group)))


def _of_all(values: torch.Tensor, group: dist.ProcessGroup) -> list[torch.Tensor]:
    everyone = [torch.empty_like(values) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, values, group=group)
    return everyone
