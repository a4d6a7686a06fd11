"""The collective clustering step over all CCE tables of a model."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Container, Hashable, Mapping
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.utils import append_prefix

from cce_torchrec.clustering import replicas
from cce_torchrec.clustering.choice import fixed_tables, left_alone, other_recipes
from cce_torchrec.clustering.chunk_state import ChunkState
from cce_torchrec.clustering.collections import cce_collections
from cce_torchrec.clustering.limits import least_free_share, memory
from cce_torchrec.clustering.local_chunks import (
    check_no_lookup_pending,
    clear_gradients,
    local_chunks,
    uncached,
)
from cce_torchrec.clustering.options import Options
from cce_torchrec.clustering.plan import Plan, task_of
from cce_torchrec.clustering.report import ChunkReport, ClusteringReport, report_of
from cce_torchrec.clustering.task import ChunkKey, Task
from cce_torchrec.clustering.work import Done, Work, wider_codes
from cce_torchrec.codes.chunk_codes import local_codes
from cce_torchrec.collectives import agree, check_backend, gather, meet, ranks_of_call
from cce_torchrec.distributed.embedding_bag_collection import ShardedCCEEmbeddingBagCollection
from cce_torchrec.gpu.usable import usable
from cce_torchrec.kmeans.backends import make_backend
from cce_torchrec.spans import span

logger = logging.getLogger(__name__)


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
    tables: Collection[str] | None = None,
    recipes: Collection[str] | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> ClusteringReport:
    """Relearns the codes of every CCE table of `model`; call it between optimizer steps.

    A collective call: every rank of `process_group` (default: all) must make it. Per chunk,
    K-means over the embeddings of all ids gives new main rows and codes, a new hash is drawn, and
    helper rows become mean residuals under it (Tsang and Ahle 2023, algorithm 3). Tables without
    learned codes or without a helper are left alone, and frozen ones are: those whose parameters
    require no gradient, or whose learning rate is 0. `report.left_alone` names them. If any chunk
    of any rank fails, nothing is written anywhere. More is in docs/clustering.md.

    Args:
        model: unsharded, or under DistributedModelParallel.
        iterations: Lloyd iterations.
        backend: see `cce_torchrec.kmeans.kmeans`.
        init: "random" (trains best), "k-means++", or "main": a start from main as it is.
        tolerance: see `cce_torchrec.kmeans.kmeans`.
        samples_per_centroid: ids per cluster that K-means sees; by default all distinct pairs, or
            200 where those do not fit `memory_limit`.
        memory_limit: bytes beside the model per rank; by default 1 GiB on a CPU, or a tenth of its
            codes if that is more, and on a GPU half of what is free on the fullest.
        weights: how much each id counts in K-means: per table name int64 [num_embeddings], or
            "seen": 1 if it was looked up in training since the last clustering, else 0 (tables
            with `track_seen`). All ids get new codes.
        metric: per table name A [num_chunks, s, s], symmetric, for (x - y)^T A (x - y) >= 0.
        optimizer: that of unsharded and data-parallel tables, whose state then follows.
        tables: names of the tables to cluster, alone or as `collection.table`; by default all.
        recipes: "frequent" or "rare", of the tables to cluster; by default both. A schedule knows
            which are due (`ClusteringSchedule.recipes_due`).
        process_group: the ranks that share the tables.

    Raises:
        ValueError: on every rank, naming table, chunk and rank: weights that are not finite, a
            data-parallel table that is not in `optimizer` or differs between ranks, bad options, no
            CCE tables, a name in `tables` of none or of a frozen one, too little memory, lookups
            that wait for their backward pass, absent ranks (where CPUs have gloo).
    """
    options = Options(
        iterations=iterations,
        backend=backend,
        init=init,
        tolerance=tolerance,
        samples_per_centroid=samples_per_centroid,
        memory_limit=memory_limit,
        weights=weights,
        metric=metric,
        tables=tables,
        recipes=recipes,
    )
    return run(model, options, optimizer, process_group)[0]


def run(
    model: nn.Module,
    options: Options,
    optimizer: torch.optim.Optimizer | None,
    process_group: dist.ProcessGroup | None,
) -> tuple[ClusteringReport, set[str]]:
    """The step; also the paths of all tables that any rank clustered."""
    began = time.perf_counter()
    group = ranks_of_call(process_group)
    meet(group)
    what = "finalize" if options.finalize else "cluster"
    with uncached(model), span(what):
        report, paths = _run(model, options, optimizer, group, began)
    if group is None or dist.get_rank(group) == 0:
        logger.info("%s: %s", what, report)
    return report, paths


def _run(
    model: nn.Module,
    options: Options,
    optimizer: torch.optim.Optimizer | None,
    group: dist.ProcessGroup | None,
    began: float,
) -> tuple[ClusteringReport, set[str]]:
    free = least_free_share(model, group)  # collective, so that ranks may disagree about a limit
    free = free if options.memory_limit is None else None
    if free is not None:
        options = replace(options, memory_limit=free)
    with span("cluster, prepare"):
        states, by_rank = agree(lambda: _prepared(model, options, optimizer, group), group)
    left = _check_agreement(by_rank, options)
    states = [(path, state) for path, state in states if path not in left]
    mine = {(path, state.chunk): state for path, state in states}
    row_wise = {key for key, state in mine.items() if state.row_wise}
    rank = 0 if group is None else dist.get_rank(group)
    plan = Plan([ready.tasks for ready in by_rank], rank, row_wise)
    # Those of other steps too, as a schedule gives every step the same options.
    known = {path.rpartition(".")[2] for ready in by_rank for path in ready.others}
    options.check_names(known | {task.table for task in plan.tasks.values()})
    whose = "half of what is free on the GPU" if free is not None else None
    peak_bytes, kept = memory(plan, states, options.memory_limit, whose, group)
    replicas.share_notes(model)  # before ids are weighed by it
    work = Work(mine, plan, kept, options, _device(model, states), group)
    with wider_codes(states, group):
        done = work.solve()
    work.commit(done)
    paths = {task.path for task in plan.tasks.values()}
    _begin_next_round(model, paths)
    chunks = _reports(done, mine, group)
    report = ClusteringReport(chunks, time.perf_counter() - began, peak_bytes, left)
    return report, paths


def _reports(
    done: Done, mine: dict[ChunkKey, ChunkState], group: dist.ProcessGroup | None
) -> list[ChunkReport]:
    """Of all chunks of all ranks, each by its owner; of copies that of the lowest rank."""
    own = {
        key: report_of(key, mine[key], *result) for key, result in done.items() if mine[key].owned
    }
    everyone = {key: r for part in reversed(gather(own, group)) for key, r in part.items()}
    return [everyone[key] for key in sorted(everyone)]


def _begin_next_round(model: nn.Module, clustered: Container[str]) -> None:
    """New hashes for the helper rows, no id seen yet, and lookups and gradients so far are old.

    Also of tables of which this rank has no chunk: a late gradient is refused on all ranks.
    """
    clear_gradients(model, clustered)
    # The buffers tell every rank that codes have changed, wherever they are.
    for path, module in cce_collections(model):
        module.frozen_main.forget()
        for name in module.codes:
            if append_prefix(path, name) in clustered:
                codes = local_codes(module.codes, name)
                codes.set_clusterings(codes.num_clusterings + 1)  # and so another helper hash
                if codes.seen is not None:
                    codes.seen.zero_()


@dataclass(frozen=True)
class _Ready:
    """What a rank tells the others before a step."""

    tasks: list[Task]
    fixed: dict[str, str]
    """Its CCE tables, and why the codes of some cannot be learned."""
    frozen: dict[str, str]
    """Tables of which it has a chunk that is not trained, and why."""
    others: dict[str, str]
    """Tables whose recipe is not asked for, and why."""
    digests: replicas.Digests
    options: Hashable
    """Their fingerprint."""
    has_kernels: bool | None
    """Whether Triton's kernels run on its GPU; None on a CPU."""


def _prepared(
    model: nn.Module,
    options: Options,
    optimizer: torch.optim.Optimizer | None,
    group: dist.ProcessGroup | None,
) -> tuple[list[tuple[str, ChunkState]], _Ready]:
    """This rank's chunks, checked, and what the others have to know."""
    options.check()
    check_no_lookup_pending(model)
    states, tasks, frozen = [], [], {}
    for path, state in local_chunks(model, optimizer, options):
        if state.frozen:
            frozen[path] = state.frozen
            continue
        state.check_group(group)
        options.check_for(state)
        states.append((path, state))
        if state.owned:
            tasks.append(task_of(path, state, options))
    device = _device(model, states)
    check_backend(device, group)
    make_backend(options.scorer, device)  # raises what is missing before anything is computed
    kernels = usable(device) if device.type == "cuda" else None
    digests = replicas.digests(states, options)
    fixed = fixed_tables(model, finalize=options.finalize)
    others = other_recipes(model, ("frequent",) if options.finalize else options.recipes)
    ready = _Ready(tasks, fixed, frozen, others, digests, options.fingerprint(), kernels)
    return states, ready


def _check_agreement(by_rank: list[_Ready], options: Options) -> dict[str, str]:
    """Why tables are left alone; raises ValueError on every rank if what they told differs."""
    if len({ready.options for ready in by_rank}) > 1:
        raise ValueError(f"ranks disagree about the options: {[r.options for r in by_rank]}")
    if len({ready.has_kernels for ready in by_rank}) > 1:  # they would count and score otherwise
        raise ValueError(
            "Triton's kernels run on some ranks and not on others (see their warnings), by rank: "
            f"{[r.has_kernels for r in by_rank]}; install the same everywhere"
        )
    replicas.check_equal([ready.digests for ready in by_rank])
    return left_alone(
        {path: why for ready in by_rank for path, why in ready.fixed.items()},
        [ready.frozen for ready in by_rank],
        [{task.path for task in ready.tasks} for ready in by_rank],
        options.tables,
        {path: why for ready in by_rank for path, why in ready.others.items()},
    )


def _device(model: nn.Module, states: list[tuple[str, ChunkState]]) -> torch.device:
    """Where this rank computes: where its chunks are, or would be if it had some."""
    if states:
        return states[0][1].weight.device
    # Its backends do not tell: a job may have one for GPUs, and tables on CPUs.
    for module in model.modules():
        if isinstance(module, ShardedCCEEmbeddingBagCollection):
            return module.device
    return torch.device("cpu")
