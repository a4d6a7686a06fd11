"""What FBGEMM has for CUDA alone, by what it has for the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


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
