"""Live views of the chunks that this rank holds: codes, codebooks and optimizer state."""

from __future__ import annotations

from collections.abc import Container, Iterator
from contextlib import ExitStack, contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.utils import append_prefix

from cce_torchrec.clustering import replicas
from cce_torchrec.clustering.choice import frozen_chunks
from cce_torchrec.clustering.chunk_group import ALONE, ChunkGroup
from cce_torchrec.clustering.chunk_state import ChunkState
from cce_torchrec.clustering.collections import cce_collections
from cce_torchrec.clustering.options import Options
from cce_torchrec.codes.chunk_codes import ChunkCodes
from cce_torchrec.distributed.caches import bypassed
from cce_torchrec.distributed.embedding_bag_collection import ShardedCCEEmbeddingBagCollection
from cce_torchrec.modules.embedding_bag_collection import CCEEmbeddingBagCollection
from cce_torchrec.optimizer_state import fused_state, is_fused, state_of
from cce_torchrec.table import physical_table
from cce_torchrec.torchrec_internals import fused_kernels, lookups_of, optimizers_in_backward


def local_chunks(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, options: Options
) -> Iterator[tuple[str, ChunkState]]:
    """Chunks of this rank of the tables that are wanted, if their codes can be learned.

    Frozen ones too, in the order of the model.

    Raises:
        ValueError: a table whose parameters `optimizer` lacks; see `replicas.check_optimizer`.
    """
    for path, module in cce_collections(model):
        copies: dict[str, dist.ProcessGroup] = {}
        if isinstance(module, ShardedCCEEmbeddingBagCollection):
            rows, own = fused_rows(module, optimizer), module.current_codes()
            copies = module.replica_groups()
        else:
            rows, own = unsharded_rows(module, optimizer), module.codes
        frozen = frozen_chunks(module, optimizer)
        for name, codes in own.items():
            assert isinstance(codes, ChunkCodes)
            whole = append_prefix(path, name)
            can_learn = codes.config.learned_codes and codes.config.helper_rows > 0
            can_learn &= codes.config.can_finalize or not options.finalize
            if not (can_learn and options.wants(whole, codes.config)):
                continue
            chunks = [physical_table(name, chunk) for chunk in codes.chunks]
            if not frozen.keys() >= set(chunks):
                replicas.check_optimizer(module, codes.config, optimizer)
            for column, chunk in enumerate(codes.chunks):
                weight, state = rows.get(chunks[column], (_nowhere(codes), {}))
                # Only what has a value a row can follow the rows; step counts stay as they are.
                kept = {k: v for k, v in state.items() if v.ndim and len(v) == len(weight)}
                holders = _holders(module, codes, chunk)
                found = ChunkState(codes, column, weight, kept, options.finalize, holders=holders)
                if found.owned:
                    found.replicas = copies.get(name)
                    found.frozen = frozen.get(chunks[column], "")
                yield whole, found


def _holders(module: nn.Module, codes: ChunkCodes, chunk: int) -> ChunkGroup:
    """Where the codes of a chunk are: on several ranks if its table is ROW_WISE."""
    table = codes.config.name
    if (
        not isinstance(module, ShardedCCEEmbeddingBagCollection)
        or table not in module.id_partitions
    ):
        return ALONE
    owner = module.id_partitions[table].ranks.index(module.chunk_owners[table][chunk])
    return ChunkGroup(module.process_group, owner, codes.clusterings.device)


def _nowhere(codes: ChunkCodes) -> torch.Tensor:
    """The codebook of a chunk whose codes alone are here."""
    where = codes.clusterings.device
    return torch.empty(0, codes.config.chunk_dim, dtype=torch.float32, device=where)


@contextmanager
def uncached(model: nn.Module) -> Iterator[None]:
    """Inside, the rows of all kernels of `model` are the current ones, and may be written.

    On CUDA it waits for the device before and after: pipelines expand ids and fill caches on
    streams of their own, which know nothing of what is rewritten here.
    """
    _wait_for_all_streams()
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, ShardedCCEEmbeddingBagCollection):
                # Also where the step fails, as the caches are emptied all the same.
                module.cache_resets.number += 1
                stack.enter_context(bypassed(lookups_of(module)))
        yield
    _wait_for_all_streams()


def clear_gradients(model: nn.Module, clustered: Container[str]) -> None:
    """Zeroes what gradients of unsharded and data-parallel tables have added up.

    A job that accumulates them over several batches would step rows of other ids by them. Where
    the step comes after `optimizer.step()`, they have been used.

    Args:
        clustered: the tables that were, with the paths of their collections.
    """
    for path, module in cce_collections(model):
        bags = module.embedding_bag_collection.embedding_bags
        for name, codes in module.codes.items():
            assert isinstance(codes, ChunkCodes)
            names = [physical_table(name, chunk) for chunk in codes.chunks]
            for physical in names if append_prefix(path, name) in clustered else []:
                if physical in bags and bags[physical].weight.grad is not None:
                    bags[physical].weight.grad.zero_()


def check_no_lookup_pending(model: nn.Module) -> None:
    """Refuses a step between a lookup of a sharded collection and its backward pass.

    Raises:
        ValueError: naming the tables, and how a pipeline is emptied.
    """
    for module in model.modules():
        if isinstance(module, ShardedCCEEmbeddingBagCollection):
            module.pending.check()


def _wait_for_all_streams() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def unsharded_rows(
    module: CCEEmbeddingBagCollection, optimizer: torch.optim.Optimizer | None
) -> dict[str, tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """Weight and optimizer state of each physical table of an unsharded collection."""
    out = {}
    module.restore_main()
    for name, bag in module.embedding_bag_collection.embedding_bags.items():
        weight = bag.weight
        optimizers = optimizers_in_backward(weight)
        if optimizer is not None:
            optimizers.append(optimizer)
        state = {k: v for opt in optimizers for k, v in state_of(weight, opt).items()}
        out[name] = (weight.data, state)
    return out


def fused_rows(
    module: ShardedCCEEmbeddingBagCollection, optimizer: torch.optim.Optimizer | None = None
) -> dict[str, tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """Live views of weight and optimizer state of each physical table in TorchRec's kernels.

    The state of data-parallel tables, whose kernels have none, is in `optimizer`.
    """
    inner = module.embedding_bag_collection
    module.restore_main()
    out = {}
    for tables, tbe in fused_kernels(lookups_of(inner)):
        states = fused_state(tbe, len(tables))
        for i, table in enumerate(tables):
            state = states[i]
            if optimizer is not None and not is_fused(tbe):
                state = state_of(inner.embedding_bags[table.name].weight, optimizer)
            out[table.name] = (tbe.split_embedding_weights()[i], state)
    return out
