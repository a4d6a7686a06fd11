"""KeyedJaggedTensors made of others, some of whose parts are exchanged."""

from __future__ import annotations

import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

INDICES = (torch.int32, torch.int64)
"""What lookups take for ids and bags."""


def remade(
    features: KeyedJaggedTensor,
    ids: torch.Tensor,
    weights: torch.Tensor | None,
    per_key: list[int] | None,
    bags: torch.dtype | None = None,
) -> KeyedJaggedTensor:
    """`features` with other ids, weights and `length_per_key`, all of its tensors contiguous.

    Lengths are of the type `bags`, by default their own.
    """
    variable, lengths = features.variable_stride_per_key(), features.lengths().reshape(-1)
    if bags is not None:
        lengths = lengths.to(bags)
    elif lengths.dtype not in INDICES:
        lengths = lengths.long()  # rows of a bag are counted in it, of which an id has several
    return KeyedJaggedTensor(
        keys=features.keys(),
        values=ids.contiguous(),
        weights=None if weights is None else weights.contiguous(),
        lengths=lengths.contiguous(),
        stride=None if variable else features.stride(),
        stride_per_key_per_rank=features.stride_per_key_per_rank() if variable else None,
        length_per_key=per_key,
        inverse_indices=features.inverse_indices_or_none(),
    )


def without_weights(features: KeyedJaggedTensor) -> KeyedJaggedTensor:
    """`features` without its weights, sharing everything else."""
    return features if features.weights_or_none() is None else with_weights(features, None)


def with_weights(features: KeyedJaggedTensor, weights: torch.Tensor | None) -> KeyedJaggedTensor:
    """`features` with other weights, sharing everything else."""
    return remade(features, features.values(), weights, features.length_per_key_or_none())


def with_ids(features: KeyedJaggedTensor, ids: torch.Tensor) -> KeyedJaggedTensor:
    """`features` with other ids, of which those beyond the last bag may be left out."""
    variable, weights = features.variable_stride_per_key(), features.weights_or_none()
    # Lengths and offsets, whichever there are: to ask for the other would cost a launch.
    return KeyedJaggedTensor(
        keys=features.keys(),
        values=ids,
        weights=None if weights is None else weights[: len(ids)],
        lengths=features.lengths_or_none(),
        offsets=features.offsets_or_none(),
        stride=None if variable else features.stride(),
        stride_per_key_per_rank=features.stride_per_key_per_rank() if variable else None,
        length_per_key=features.length_per_key_or_none(),
        inverse_indices=features.inverse_indices_or_none(),
    )
