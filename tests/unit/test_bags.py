"""Sums and bounds of bags' lengths: the compiled form is that in torch."""

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from cce_torchrec.lookup import native
from cce_torchrec.lookup.bags import count_bags


@pytest.fixture(params=["compiled", "torch"])
def form(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(native, "available", lambda: False)
    elif not native.available():
        pytest.skip("the kernels are not built")


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("lengths", "sizes", "expected"),
    [
        ([1, 2, 3, 4], [2, 2], ([3, 7], 1, 4)),
        ([5, 0, 7], [0, 3, 0], ([0, 12, 0], 0, 7)),
        ([-3, 2**31 - 1], [1, 1], ([-3, 2**31 - 1], -3, 2**31 - 1)),
        ([2**31 - 1] * 3, [3], ([3 * (2**31 - 1)], 2**31 - 1, 2**31 - 1)),
        ([1] * 1001, [1000, 1], ([1000, 1], 1, 1)),
        ([], [0, 0], ([0, 0], 0, 0)),
    ],
)
def test_counts(form, dtype, lengths, sizes, expected):
    assert count_bags(torch.tensor(lengths, dtype=dtype), sizes) == expected


def test_sums_of_absurd_lengths_wrap_and_their_bounds_do_not(form):
    sums, low, high = count_bags(torch.tensor([2**62, 2**62, 2**62, 2**62]), [4])
    assert (sums, low, high) == ([0], 2**62, 2**62)


def test_fake_lengths_are_not_read(form):
    """The compiled form would read from address 0."""
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        count_bags(torch.zeros(4, dtype=torch.int64), [2, 2])
