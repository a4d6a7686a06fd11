"""What a run trains: batches as pipelines take them, the model with its loss, the optimizers."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torchrec
from torch import nn
from torchrec.distributed import DistributedModelParallel
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from cce_torchrec.distributed.sharders import get_default_sharders
from cce_torchrec.modules.embedding_bag_collection import CCEEmbeddingBagCollection
from cce_torchrec.planning import PlanReport, make_plan, plan_report
from cce_torchrec.train.model import GMF, DLRMLogits

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "rowwise_adagrad": torchrec.optim.RowWiseAdagrad,
    "adagrad": torch.optim.Adagrad,
    "sgd": torch.optim.SGD,
}


@dataclass
class Batch(Pipelineable):
    """Shapes: `dense` float32 [B, d], `labels` float32 [B]."""

    dense: torch.Tensor
    ids: KeyedJaggedTensor
    labels: torch.Tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> Batch:
        """The batch on `device`."""
        return Batch(
            self.dense.to(device, non_blocking=non_blocking),
            self.ids.to(device, non_blocking=non_blocking),
            self.labels.to(device, non_blocking=non_blocking),
        )

    def record_stream(self, stream: torch.Stream) -> None:
        """Keeps the memory until `stream` has used it."""
        for part in (self.dense, self.ids, self.labels):
            part.record_stream(stream)  # type: ignore[arg-type]  # torch's and TorchRec's stubs differ

    def pin_memory(self) -> Batch:
        """The batch in pinned memory."""
        return Batch(self.dense.pin_memory(), self.ids.pin_memory(), self.labels.pin_memory())


@torch.fx.wrap  # pipelines trace the model, and what depends on sizes is not to be looked into
def mean_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean binary cross-entropy of logits and labels [B], both float32; 0 where B is 0."""
    # A rank's share of a small batch may be empty, and a mean of nothing is no number.
    reduction = "mean" if len(labels) else "sum"
    return nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction=reduction)


class WithLoss(nn.Module):
    """(loss, (loss, logits, labels)) of a batch, as TorchRec's pipelines expect it."""

    def __init__(self, logits: nn.Module) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, batch: Batch) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Mean binary cross-entropy (0 of no example), to be trained on, then detached outputs."""
        logits = self.logits(batch.dense, batch.ids)
        loss = mean_loss(logits, batch.labels)
        return loss, (loss.detach(), logits.detach(), batch.labels)


class Built(NamedTuple):
    """A sharded model, what trains it, and where its tables are."""

    model: DistributedModelParallel
    optimizer: CombinedOptimizer
    """Of its tables (fused), then of its network (Adam) if it has one."""
    plan: PlanReport


def build(
    args: argparse.Namespace,
    configs: Sequence[EmbeddingBagConfig],
    dense_features: int,
    device: torch.device,
    rank: int,
    fused_params: dict[str, Any] | None = None,
) -> Built:
    """The sharded model, one optimizer of its tables and its network, and what the plan says.

    Args:
        fused_params: of the tables' kernels, where the pipeline needs some.
    """
    # On meta, as whole tables are never needed: DistributedModelParallel makes the shards.
    collection = CCEEmbeddingBagCollection(configs, device=torch.device("meta"))
    # Before the plan: else TorchRec gives tables its dense kernel, which no backward trains.
    apply_optimizer_in_backward(
        OPTIMIZERS[args.optimizer], collection.parameters(), {"lr": args.lr}
    )
    model = WithLoss(
        GMF(collection)
        if args.model == "gmf"
        else DLRMLogits(collection, dense_features, args.embedding_dim)
    )
    plan = make_plan(model, configs, device, args.plan, batch_size=args.batch_size)
    sharders = get_default_sharders(fused_params)
    report = plan_report(model, plan, dist.get_world_size())
    torch.manual_seed(args.seed + 1 + rank)  # tables differ by rank, DDP syncs the rest
    sharded = DistributedModelParallel(model, device=device, plan=plan, sharders=sharders)
    dense = {
        name: parameter
        for name, parameter in sharded.named_parameters()
        if "embedding_bag_collection" not in name.split("sparse_arch")[-1]
    }
    optimizers = [sharded.fused_optimizer]
    if dense:
        optimizers.append(
            KeyedOptimizerWrapper(dense, lambda p: torch.optim.Adam(p, lr=args.dense_lr))
        )
    return Built(sharded, CombinedOptimizer(optimizers), report)
