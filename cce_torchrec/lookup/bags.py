"""How many ids the bags of a batch have, by their lengths."""

from __future__ import annotations

from collections.abc import Sequence

import torch

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
