"""How many ids the bags of a batch have, by their lengths; and bags of a single id."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from cce_torchrec.lookup import native


def count_bags(lengths: torch.Tensor, sizes: Sequence[int]) -> tuple[list[int], int, int]:
    """The ids of each key, and the least and the greatest length of a bag.

    Args:
        lengths: int32 or int64 [bags of all keys], key after key, contiguous.
        sizes: bags of each key, all of `lengths` together.

    Returns:
        Sums that wrap where lengths are absurd: look at the bounds first. Zeros without a bag.
    """
    if not lengths.numel():
        return [0] * len(sizes), 0, 0
    # Several operators of torch take three times as long for 26 tables of 4,096 bags.
    compiled = native.takes(lengths) and not native.is_traced(lengths)
    count = native.count_bags if compiled else _count_in_torch
    *sums, low, high = count(lengths, sizes)
    return sums, low, high


def _count_in_torch(lengths: torch.Tensor, sizes: Sequence[int]) -> list[int]:
    sums = [own.sum() for own in lengths.split(list(sizes))]
    return torch.stack([*sums, *(bound.long() for bound in lengths.aminmax())]).tolist()


def bags_of_one(
    features: KeyedJaggedTensor, batch_sizes: list[int], rows: Sequence[int] = ()
) -> KeyedJaggedTensor:
    """`features` with every id in a bag of its own.

    Args:
        features: one batch, or those of several ranks one after the other.
        batch_sizes: by rank.
        rows: values that an id has, by feature; where it is left out, each is an id.
    """
    lengths = features.lengths().view(len(features.keys()), sum(batch_sizes))
    counts = torch.stack([part.sum(1) for part in lengths.split(batch_sizes, dim=1)], dim=1)
    bags = counts.tolist()
    # Values beyond the last bag would be bags as well.
    values = features.values()[: sum(map(sum, bags))]
    ones = torch.ones_like(values, dtype=lengths.dtype)
    # Rows of ROW_WISE tables come as one feature, and main and helper belong to one id.
    if any(each > 1 for each in rows):
        bags = [[count // each for count in own] for own, each in zip(bags, rows, strict=True)]
        own = torch.tensor([sum(own) for own in bags], device=ones.device)
        ones = lengths.new_tensor(rows).repeat_interleave(own)
    return KeyedJaggedTensor(
        keys=features.keys(), values=values, lengths=ones, stride_per_key_per_rank=bags
    )


def bags_of_one_alike(features: KeyedJaggedTensor) -> KeyedJaggedTensor:
    """The same with as many bags of each feature, the last of them empty: with one batch size.

    For kernels of data-parallel tables, which take no other batch.
    """
    counts = features.lengths().view(len(features.keys()), -1).sum(1, keepdim=True)
    most = max(counts.view(-1).tolist())
    has_id = torch.arange(most, device=counts.device) < counts
    return KeyedJaggedTensor(
        keys=features.keys(),
        values=features.values()[: sum(features.length_per_key())],
        lengths=has_id.to(features.lengths().dtype).view(-1),
        stride=most,
    )
