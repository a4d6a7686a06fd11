"""The last clustering: main takes over the helper's rows, and lookups read one row per chunk."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.utils import append_prefix

from cce_torchrec.clustering.collections import cce_collections
from cce_torchrec.clustering.options import Options
from cce_torchrec.clustering.report import ClusteringReport
from cce_torchrec.clustering.step import run
from cce_torchrec.codes.chunk_codes import local_codes


def finalize(
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
    process_group: dist.ProcessGroup | None = None,
) -> ClusteringReport:
    """Clusters every CCE table of `model` a last time, with k + k' clusters, and drops its helper.

    Collective, between optimizer steps, with the arguments and errors of `cluster`; only init
    "main" is refused. Parameters and optimizer state keep their tensors and shapes, and training
    may go on, best for the last tenth of it. Codes become wider where k + k' rows need it. The
    tables' configurations (`embedding_bag_configs()`) become those of
    `CCEEmbeddingBagConfig.finalized()`; a model configured so loads the finalized one's
    checkpoints. A plan made before stays valid.

    Tables without learned codes or without a helper are left alone, so a second call does
    nothing but say so, and frozen ones are, which keep their helper. So do those of the recipe
    "rare", whose few bits a code could not tell all rows apart. If any chunk of any rank fails,
    nothing is written anywhere.
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
        finalize=True,
        tables=tables,
    )
    report, paths = run(model, options, optimizer, process_group)
    # On every rank, also where other ranks alone hold a table's chunks: all describe it alike.
    for path, module in cce_collections(model):
        for table in module.tables:
            if append_prefix(path, table.name) in paths:
                table.finalize()
        for name in module.codes:
            local_codes(module.codes, name).follow_table()
    return report
