"""TorchRec's pipelines, which copy and distribute later batches while one is trained on."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torchrec.distributed.train_pipeline import (
    PrefetchTrainPipelineSparseDist,
    TrainPipelineSparseDist,
)


def chosen(name: str, device: torch.device, world_size: int) -> str:
    """What `name` of `options.PIPELINES` is on this device: sparse-dist, prefetch or none.

    On a CPU a pipeline hides nothing but what other ranks are waited for.

    Raises:
        ValueError: prefetch without CUDA.
    """
    if name == "prefetch" and device.type != "cuda":
        raise ValueError(
            f"--pipeline prefetch fills caches on a CUDA device, and this run is on {device}; use "
            "--pipeline sparse-dist, or auto"
        )
    if name == "auto":
        return "sparse-dist" if device.type == "cuda" or world_size > 1 else "none"
    return name


def fused_params(pipeline: str) -> dict[str, Any] | None:
    """What sharders must give the tables' kernels for this pipeline."""
    # FBGEMM's kernels take it only when they are made, which is what sharders do.
    return {"prefetch_pipeline": True} if pipeline == "prefetch" else None


def make(
    pipeline: str, model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device
) -> TrainPipelineSparseDist[Any, Any]:
    """A pipeline of this kind, sparse-dist or prefetch, over `model`."""
    kinds = {"sparse-dist": TrainPipelineSparseDist, "prefetch": PrefetchTrainPipelineSparseDist}
    return kinds[pipeline](model, optimizer, device)
