"""The collective clustering step over all CCE tables of a model."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cce_torchrec.clustering.chunk import ChunkState, ChunkUpdate, commit, recluster
from cce_torchrec.distributed.embedding_bag_collection import ShardedCCEEmbeddingBagCollection
from cce_torchrec.expand import ChunkCodes, physical_table
from cce_torchrec.modules.embedding_bag_collection import CCEEmbeddingBagCollection


@dataclass(frozen=True)
class ChunkReport:
    """What the clustering step did to one chunk."""

    table: str
    """Path of the table's collection in the model, and the table's name."""
    chunk: int
    ids: int
    objective_before: float
    """Sum over ids of the squared distance between embedding and main row."""
    objective_after: float
    """The same with the new codes and the new main rows."""
    changed: float
    """Share of ids whose code is another one."""
    empty_clusters: int
    seconds: float


@dataclass(frozen=True)
class ClusteringReport:
    """What the clustering step did; the same on every rank, seconds apart."""

    chunks: list[ChunkReport] = field(default_factory=list)
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def cluster(
    model: nn.Module,
    *,
    iterations: int = 6,
    optimizer: torch.optim.Optimizer | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> ClusteringReport:
    """Relearns the codes of every CCE table of `model`; call it between optimizer steps.

    A collective call: every rank of `process_group` (default: all) must make it. Per chunk,
    K-means over the embeddings of all ids gives new main rows and codes, a new hash is drawn, and
    helper rows become mean residuals under it (Tsang and Ahle 2023, algorithm 3). Tables without
    learned codes or without a helper are left alone. If any chunk of any rank fails, nothing is
    written anywhere.

    Args:
        model: unsharded, or under DistributedModelParallel.
        iterations: Lloyd iterations.
        optimizer: the dense optimizer of unsharded tables, whose state then follows.
        process_group: the ranks that share the tables.

    Raises:
        ValueError: on every rank, naming table, chunk and rank, if weights are not finite.
    """
    began = time.perf_counter()
    updates: list[tuple[ChunkState, ChunkUpdate]] = []
    reports: list[ChunkReport] = []
    failure: str | None = None
    try:
        for path, state in _local_chunks(model, optimizer):
            started = time.perf_counter()
            update = recluster(state, iterations)
            updates.append((state, update))
            reports.append(
                ChunkReport(
                    table=path,
                    chunk=state.chunk,
                    ids=state.codes.config.num_embeddings,
                    objective_before=update.objective_before,
                    objective_after=update.objective_after,
                    changed=update.changed,
                    empty_clusters=update.empty_clusters,
                    seconds=time.perf_counter() - started,
                )
            )
    except Exception as error:  # told to every rank below, then raised there
        failure = str(error)
    reports = _agree(failure, reports, process_group)
    for state, update in updates:
        commit(state, update)
    for codes in {id(state.codes): state.codes for state, _ in updates}.values():
        codes.set_rounds(codes.rounds + 1)
    return ClusteringReport(reports, time.perf_counter() - began)


def _agree(
    failure: str | None, reports: list[ChunkReport], group: dist.ProcessGroup | None
) -> list[ChunkReport]:
    """All ranks' reports, one per chunk, in order; raises everywhere if any rank failed."""
    gathered: list[tuple[str | None, list[ChunkReport]]] = [(failure, reports)]
    if dist.is_available() and dist.is_initialized():
        gathered = [(None, [])] * dist.get_world_size(group)
        dist.all_gather_object(gathered, (failure, reports), group=group)
    failures = [f"rank {rank}: {f}" for rank, (f, _) in enumerate(gathered) if f is not None]
    if failures:
        raise ValueError("; ".join(failures))
    unique = {(r.table, r.chunk): r for _, part in reversed(gathered) for r in part}
    return [unique[key] for key in sorted(unique)]


def _local_chunks(
    model: nn.Module, optimizer: torch.optim.Optimizer | None
) -> Iterator[tuple[str, ChunkState]]:
    """Chunks that this rank owns and that cluster, in the order of the model."""
    for path, module in model.named_modules():
        if isinstance(module, ShardedCCEEmbeddingBagCollection):
            rows = _fused_rows(module)
        elif isinstance(module, CCEEmbeddingBagCollection):
            rows = _unsharded_rows(module, optimizer)
        else:
            continue
        for name, codes in module.codes.items():
            assert isinstance(codes, ChunkCodes)
            if codes.codes is None or codes.config.helper_rows == 0:
                continue
            for column, chunk in enumerate(codes.chunks):
                weight, state = rows[physical_table(name, chunk)]
                kept = {k: v for k, v in state.items() if v.ndim and len(v) == len(weight)}
                yield (
                    f"{path}.{name}" if path else name,
                    ChunkState(codes, column, weight, kept),
                )


def _unsharded_rows(
    module: CCEEmbeddingBagCollection, optimizer: torch.optim.Optimizer | None
) -> dict[str, tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """Weight and optimizer state of each physical table of an unsharded collection."""
    out = {}
    for name, bag in module.embedding_bag_collection.embedding_bags.items():
        weight = bag.weight
        optimizers = list(getattr(weight, "_in_backward_optimizers", []))
        if optimizer is not None:
            optimizers.append(optimizer)
        state = {
            key: value
            for opt in optimizers
            for key, value in opt.state.get(weight, {}).items()
            if isinstance(value, torch.Tensor)
        }
        out[name] = (weight.data, state)
    return out


def _fused_rows(
    module: ShardedCCEEmbeddingBagCollection,
) -> dict[str, tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """Live views of weight and optimizer state of each physical table in the fused kernels."""
    out = {}
    for lookup in module.embedding_bag_collection._lookups:
        while isinstance(lookup, DistributedDataParallel):
            lookup = lookup.module
        for kernel in lookup._emb_modules:
            tbe = kernel.emb_module
            states = tbe.get_optimizer_state() if hasattr(tbe, "get_optimizer_state") else []
            for i, table in enumerate(kernel._config.embedding_tables):
                state = states[i] if i < len(states) else {}
                out[table.name] = (tbe.split_embedding_weights()[i], state)
    return out
