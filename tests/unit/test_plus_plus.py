"""k-means++ picks what a plain loop picks, and Lloyd's loop seldom waits for the device."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cce_torchrec.kmeans import kmeans
from cce_torchrec.kmeans.lloyd import refill_empty
from cce_torchrec.kmeans.plus_plus import _integers, plus_plus

WAITS = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select"}


class Waits(TorchDispatchMode):
    """Counts operations upon which the host would wait for a GPU."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        by_mask = name == "index" and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        self.count += name in WAITS or by_mask
        return function(*args, **(kwargs or {}))


def plain_plus_plus(sample, k):
    """A draw, two reads of the device and a pick for each centroid."""
    generator = torch.Generator().manual_seed(len(sample) * 1_000_003 + k)
    out = torch.zeros(k, sample.shape[1])
    distance = torch.full((len(sample),), torch.inf, dtype=torch.float64)
    pick = 0
    for i in range(min(k, len(sample))):
        out[i] = sample[pick]
        distance = torch.minimum(distance, (sample - sample[pick]).double().square().sum(1))
        total = distance.cumsum(0)
        draw = float(torch.rand((), generator=generator, dtype=torch.float64)) * float(total[-1])
        pick = min(int(torch.searchsorted(total, draw, right=True)), len(sample) - 1)
    return out


def samples():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 8, generator=generator)
    return {
        "normal": (x, 150),
        "half equal": (torch.cat([x[:1].expand(1000, 8), x[:1000]]), 64),
        "all equal": (x[:1].expand(50, 8).contiguous(), 7),
        "fewer than clusters": (x[:5], 12),
        "one": (x[:1], 1),
        "wide": (x * torch.logspace(-15, 15, 2000)[:, None], 40),
        "narrow": (x[:, :1], 33),
    }


@pytest.mark.parametrize("name", samples())
def test_picks_are_those_of_the_plain_loop(name):
    sample, k = samples()[name]
    assert torch.equal(plus_plus(sample, k), plain_plus_plus(sample, k))


@pytest.mark.parametrize("name", samples())
def test_picks_by_integers_as_on_a_gpu(name, monkeypatch):
    """Their sums are equal in any order; picks would differ only where a draw is on an edge."""
    sample, k = samples()[name]
    monkeypatch.setattr(
        "cce_torchrec.kmeans.plus_plus._running_sums",
        lambda distance: _integers(distance).cumsum(0),
    )
    assert torch.equal(plus_plus(sample, k), plain_plus_plus(sample, k))
    distance = sample.double().square().sum(1)
    integers = _integers(distance)
    assert int(integers.min()) >= 0
    assert sum(integers.tolist()) < 1 << 62
    if float(distance.max()):  # none is lost but where it is below a billionth of the largest
        share = integers.double() / integers.max() - distance / distance.max()
        assert float(share.abs().max()) < 1e-9


def test_plus_plus_waits_for_no_pick():
    counts = []
    for k in (5, 50):
        with Waits() as waits:
            plus_plus(torch.randn(400, 4, generator=torch.Generator().manual_seed(1)), k)
        counts.append(waits.count)
    assert counts == [0, 0]


def test_an_iteration_waits_once(monkeypatch):
    """And three times where clusters are empty: to split some, and to see whether that ends it."""
    lists, tolist = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: lists.append(1) or tolist(self))
    points = torch.randn(3000, 4, generator=torch.Generator().manual_seed(2))
    counts = []
    for iterations in (2, 7):
        lists.clear()
        with Waits() as waits:
            result = kmeans(points, 20, iterations, backend="torch")
        assert len(result.iterations) == iterations + 1
        assert not any(one.splits for one in result.iterations)
        counts.append(waits.count + len(lists))
    assert counts[1] - counts[0] == 5
    with Waits() as waits:
        _, splits = refill_empty(points[:20], torch.arange(20) % 3, torch.arange(20), 0)
    assert (splits, waits.count) == (7, 1)
