"""k-means++ (Arthur and Vassilvitskii 2007): starting centroids far from each other."""

from __future__ import annotations

import torch


def plus_plus(sample: torch.Tensor, k: int) -> torch.Tensor:
    """Starting centroids [k, s] among `sample` [n, s], float32; zero where n is less than k.

    Draws depend on n and k alone, and the loop does not wait for the device.
    """
    count = min(k, len(sample))
    generator = torch.Generator().manual_seed(len(sample) * 1_000_003 + k)
    draws = torch.rand(count, generator=generator, dtype=torch.float64, device="cpu")
    draws = draws.to(sample.device)
    distance = torch.full((len(sample),), torch.inf, dtype=torch.float64, device=sample.device)
    # Picks stay on the device; to index by a tensor without a dimension would wait for it.
    picks = torch.zeros(count + 1, dtype=torch.int64, device=sample.device)
    for i in range(count):
        picked = sample.index_select(0, picks[i : i + 1])
        distance = torch.minimum(distance, (sample - picked).double().square().sum(1))
        total = _running_sums(distance)
        draw = (draws[i : i + 1] * total[-1:]).to(total.dtype)
        pick = torch.searchsorted(total, draw, right=True)
        picks[i + 1 : i + 2] = pick.clamp(max=len(sample) - 1)
    out = sample.new_zeros(k, sample.shape[1])
    out[:count] = sample[picks[:count]]
    return out


def _running_sums(distance: torch.Tensor) -> torch.Tensor:
    """Running sums of finite float64 values of at least 0; on a GPU those of scaled integers.

    There float sums depend on the order, which differs from run to run, and every rank picks for
    itself.
    """
    if distance.device.type == "cpu":
        return distance.cumsum(0)
    return _integers(distance).cumsum(0)


def _integers(distance: torch.Tensor) -> torch.Tensor:
    """`distance` times a common factor such that the sum of all is below 2^62; int64."""
    room = 62 - len(distance).bit_length()
    exponent = torch.frexp(distance.max()).exponent
    return (distance * torch.exp2((room - exponent).double())).long()
