"""The collective clustering step over all CCE tables of a model."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cce_torchrec.clustering.chunk import ChunkState, ChunkUpdate, budget, commit
from cce_torchrec.clustering.meeting import meet
from cce_torchrec.clustering.solve import Options, Task, alone, together
from cce_torchrec.distributed.embedding_bag_collection import ShardedCCEEmbeddingBagCollection
from cce_torchrec.expand import ChunkCodes, physical_table
from cce_torchrec.modules.embedding_bag_collection import CCEEmbeddingBagCollection

T = TypeVar("T")
DEFAULT_MEMORY_LIMIT = 1 << 30


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
    peak_bytes: int = 0
    """Most bytes beside the model on this rank, as computed before the step."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def cluster(
    model: nn.Module,
    *,
    iterations: int = 6,
    backend: str = "auto",
    init: str = "random",
    tolerance: float = 0.0,
    samples_per_centroid: int | None = None,
    memory_limit: int | None = None,
    weights: Mapping[str, torch.Tensor] | str | None = None,
    metric: Mapping[str, torch.Tensor] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> ClusteringReport:
    """Relearns the codes of every CCE table of `model`; call it between optimizer steps.

    A collective call: every rank of `process_group` (default: all) must make it. Per chunk,
    K-means over the embeddings of all ids gives new main rows and codes, a new hash is drawn, and
    helper rows become mean residuals under it (Tsang and Ahle 2023, algorithm 3). Tables without
    learned codes or without a helper are left alone. If any chunk of any rank fails, nothing is
    written anywhere. Ranks share the scoring of large chunks; small ones are done by their owner.
    Codes never cross the network.

    Args:
        model: unsharded, or under DistributedModelParallel.
        iterations: Lloyd iterations.
        backend: see `cce_torchrec.kmeans.kmeans`.
        init: "random" (a cold start, which trains best), "k-means++", or "main": a warm start
            from the present main codebook.
        tolerance: see `cce_torchrec.kmeans.kmeans`.
        samples_per_centroid: ids per cluster that K-means sees, drawn by hash; by default all
            distinct pairs, or 200 where those do not fit `memory_limit`.
        memory_limit: bytes beside the model per rank; by default what fits 1 GiB or a tenth of
            the rank's codes, whichever is larger, aside from new codes that wait to be written.
        weights: how much each id counts in K-means: per table name int64 [num_embeddings], or
            "seen": ids that were looked up in training since the last clustering count once,
            others not (tables with `track_seen`). All ids get new codes.
        metric: per table name [num_chunks, s, s], symmetric and positive semi-definite: K-means
            measures (x - y)^T A (x - y). With the second moment of the loss gradient with respect
            to the chunk this is the Fisher metric: errors that the loss feels count.
        optimizer: the dense optimizer of unsharded tables, whose state then follows.
        process_group: the ranks that share the tables.

    Raises:
        ValueError: on every rank, naming table, chunk and rank: weights that are not finite,
            unusable options, more memory needed than a `memory_limit` that was given, ranks
            that did not make the call (gloo).
    """
    began = time.perf_counter()
    options = Options(
        iterations, backend, init, tolerance, samples_per_centroid, memory_limit, weights, metric
    )
    group = _group(process_group)
    meet(group)
    states: list[tuple[str, ChunkState]] = []
    tasks: list[Task] = []
    failure: str | None = None
    peak_bytes = 0
    try:
        options.check()
        states = list(_local_chunks(model, optimizer))
        for _, state in states:
            options.check_for(state)
        tasks = _plan(states, options)
        peak_bytes = _peak_bytes(tasks, memory_limit)
        options.make_backend(_device(states))
    except Exception as error:  # told to every rank below, then raised there
        failure = str(error)
    plans = _gathered((failure, tasks), group)
    _raise_failures([f for f, _ in plans])
    mine = {task.key: state for task, (_, state) in zip(tasks, states, strict=True)}
    done = _solve(mine, [theirs for _, theirs in plans], options, _device(states), group)
    for key, (update, _) in done.items():
        commit(mine[key], update)
    for codes in {id(state.codes): state.codes for state in mine.values()}.values():
        codes.set_rounds(codes.rounds + 1)
        if codes.seen is not None:
            codes.seen.zero_()
    reports = {key: _report(key, mine[key], *result) for key, result in done.items()}
    everyone = {key: r for part in reversed(_gathered(reports, group)) for key, r in part.items()}
    chunks = [everyone[key] for key in sorted(everyone)]
    return ClusteringReport(chunks, time.perf_counter() - began, peak_bytes)


Key = tuple[str, int]


def _solve(
    mine: dict[Key, ChunkState],
    plans: list[list[Task]],
    options: Options,
    device: torch.device,
    group: dist.ProcessGroup | None,
) -> dict[Key, tuple[ChunkUpdate, float]]:
    """Updates of this rank's chunks, and their seconds; writes nothing.

    Chunks that one rank alone owns and that are large are scored by all ranks, in one order; the
    others by their owners, side by side.
    """
    tasks = {task.key: task for theirs in plans for task in theirs}
    owners: dict[Key, list[int]] = {}
    for rank, theirs in enumerate(plans):
        for task in theirs:
            owners.setdefault(task.key, []).append(rank)
    common = [
        key
        for key in sorted(tasks)
        if len(plans) > 1 and tasks[key].shared and len(owners[key]) == 1
    ]
    done: dict[Key, tuple[ChunkUpdate, float]] = {}
    failure: str | None = None
    try:
        for key in sorted(set(mine) - set(common)):
            started = time.perf_counter()
            update = alone(mine[key], tasks[key], options)
            done[key] = (update, time.perf_counter() - started)
    except Exception as error:
        failure = str(error)
    _raise_failures(_gathered(failure, group))
    for key in common:
        assert group is not None
        started = time.perf_counter()
        result = together(mine.get(key), tasks[key], owners[key][0], options, device, group)
        if result is not None:
            done[key] = (result, time.perf_counter() - started)
    return done


def _report(key: Key, state: ChunkState, update: ChunkUpdate, seconds: float) -> ChunkReport:
    return ChunkReport(
        table=key[0],
        chunk=key[1],
        ids=state.codes.config.num_embeddings,
        objective_before=update.objective_before,
        objective_after=update.objective_after,
        changed=update.changed,
        empty_clusters=update.empty_clusters,
        seconds=seconds,
    )


def _group(process_group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """The ranks of the call; None for a single process."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    return process_group if process_group is not None else dist.group.WORLD


def _device(states: list[tuple[str, ChunkState]]) -> torch.device:
    """Where this rank computes."""
    if states:
        return states[0][1].weight.device
    on_cuda = dist.is_initialized() and dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_cuda else torch.device("cpu")


def _gathered(own: T, group: dist.ProcessGroup | None) -> list[T]:
    """Every rank's object, by rank."""
    if group is None:
        return [own]
    out: list[T] = [own] * dist.get_world_size(group)
    dist.all_gather_object(out, own, group=group)
    return out


def _raise_failures(failures: list[str | None]) -> None:
    """Raises on every rank what failed on any."""
    named = [f"rank {rank}: {f}" for rank, f in enumerate(failures) if f is not None]
    if named:
        raise ValueError("; ".join(named))


def _plan(states: list[tuple[str, ChunkState]], options: Options) -> list[Task]:
    """How each chunk of this rank is clustered."""
    codes = {id(s.codes): s.codes.codes for _, s in states}
    code_bytes = sum(c.numel() * c.element_size() for c in codes.values() if c is not None)
    limit = options.memory_limit
    if limit is None:
        limit = max(DEFAULT_MEMORY_LIMIT, code_bytes // 10)
    tasks = []
    for path, state in states:
        config = state.codes.config
        shape = (config.num_embeddings, config.num_rows, config.helper_rows, config.chunk_dim)
        plan = budget(*shape, limit, options.samples_per_centroid, options.weights is not None)
        pairs = min(config.num_embeddings, config.num_rows * config.helper_rows)
        tasks.append(
            Task(path, config.name, state.chunk, *shape[1:], config.num_rows * pairs, plan)
        )
    return tasks


def _peak_bytes(tasks: list[Task], memory_limit: int | None) -> int:
    """Most bytes that the step takes on this rank beside the model, computed in advance.

    Raises:
        ValueError: if that is more than a limit that was given.
    """
    working = max((task.budget.working_bytes for task in tasks), default=0)
    peak = working + sum(task.budget.pending_bytes for task in tasks)
    if memory_limit is not None and peak > memory_limit:
        raise ValueError(
            f"clustering needs up to {peak} bytes beside the model ({working} for its largest "
            f"chunk, {peak - working} for new codes until all are written) and memory_limit is "
            f"{memory_limit}; raise it, or lower samples_per_centroid"
        )
    return peak


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
