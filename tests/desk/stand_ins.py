"""What FBGEMM has for CUDA alone, and what TorchRec does to tensors that cannot be emulated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)

from tests.desk import counts


def _index_select_dim1(
    values: torch.Tensor,
    lengths: torch.Tensor,
    offsets: torch.Tensor,
    indices: torch.Tensor,
    batch_size: int,
    weights: torch.Tensor | None = None,
    selected_lengths_sum: int | None = None,
) -> list[torch.Tensor | None]:
    """`keyed_jagged_index_select_dim1` of one key, as TorchRec permutes features by it."""
    assert batch_size == lengths.numel(), "several keys"
    permuted = torch.ops.fbgemm.permute_1D_sparse_data(
        indices.int(), lengths, values, weights, selected_lengths_sum
    )
    return [permuted[1], permuted[0], *([permuted[2]] if weights is not None else [])]


STAND_INS: dict[str, Callable[..., Any]] = {
    "fbgemm::keyed_jagged_index_select_dim1": _index_select_dim1,
}
"""By the operator's name; they take CPU tensors."""


def table_slice(
    data: torch.Tensor, start_offset: int, end_offset: int, num_embeddings: int, embedding_dim: int
) -> torch.nn.Parameter:
    """TorchRec's `TableBatchedEmbeddingSlice`, without its gradient: a tensor has one subclass."""
    rows = data.detach()[start_offset:end_offset].view(num_embeddings, embedding_dim)
    return torch.nn.Parameter(rows, data.requires_grad)


def lookup(
    module: Any,
    indices: torch.Tensor,
    offsets: torch.Tensor,
    per_sample_weights: torch.Tensor | None = None,
    **others: Any,
) -> torch.Tensor:
    """Forward of FBGEMM's table-batched embeddings, by a CPU module over the same memory.

    Weights get no gradient.
    """
    others = {key: value for key, value in others.items() if value is not None}
    assert not others, f"not emulated: {others}"
    if "desk_twin" not in module.__dict__:
        module.__dict__["desk_twin"] = _cpu_twin(module)
    twin = module.__dict__["desk_twin"]
    twin.set_learning_rate(module.get_learning_rate())
    return _Lookup.apply(
        module.placeholder_autograd_tensor, twin, indices, offsets, per_sample_weights
    )


def _cpu_twin(module: Any) -> Any:
    twin = SplitTableBatchedEmbeddingBagsCodegen(
        [
            (rows, dim, EmbeddingLocation.HOST, ComputeDevice.CPU)
            for rows, dim, *_ in module.embedding_specs
        ],
        feature_table_map=module.feature_table_map,
        optimizer=module.optimizer,
        pooling_mode=module.pooling_mode,
        eps=module.optimizer_args.eps,
        device=torch.device("cpu"),
    )
    twin.weights_host = torch.nn.Parameter(module.weights_dev.on_cpu)
    if hasattr(module, "momentum1_dev"):
        held = twin.momentum1_host.requires_grad
        twin.momentum1_host = torch.nn.Parameter(module.momentum1_dev.on_cpu, held)
    return twin


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, twin: Any, *inputs: torch.Tensor | None) -> Any:
        own = [None if t is None else t.on_cpu for t in inputs]
        with torch.enable_grad():
            ctx.out = twin(*own)
        counts.launched("FBGEMM's lookup")
        return type(inputs[0])(ctx.out.detach())

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, ...]:
        counts.launched("FBGEMM's update")
        ctx.out.backward(grad.on_cpu.contiguous())
        return (None,) * 5
