"""Batches that no collection may look up, each a fault in an otherwise good one of `batch`."""

from __future__ import annotations

import torch
from tensordict import TensorDict
from torchrec import JaggedTensor, KeyedJaggedTensor

from tests.support.models import KEYS, STRIDE, batch, vbe_batch

HUGE = 2**62
"""Four of them are 0 in int64."""


def made(seed=0, **changed):
    """A batch of `KEYS` whose parts are `changed`."""
    kjt = batch(seed, False)
    parts = dict(keys=KEYS, values=kjt.values(), lengths=kjt.lengths(), stride=STRIDE)
    return KeyedJaggedTensor(**parts | changed)


def tensor_dict(kjt):
    """The same batch as TorchRec takes it in place of a KeyedJaggedTensor."""
    jagged = kjt.to_dict().items()
    return TensorDict({k: JaggedTensor(own.values(), lengths=own.lengths()) for k, own in jagged})


def lengths_with(**at):
    """Lengths of `made`, some of them others."""
    lengths = batch(0, False).lengths().clone()
    for place, value in at.items():
        lengths[int(place[1:])] = value
    return lengths


def offsets_with(start=0, **at):
    """Offsets of `made`, likewise, or all of them moved by `start`."""
    offsets = torch.nn.functional.pad(batch(0, False).lengths().cumsum(0), (1, 0)) + start
    for place, value in at.items():
        offsets[int(place[1:])] = value
    return offsets


def of_variable_size(**changed):
    """A batch of a size per feature whose parts are `changed`."""
    kjt = vbe_batch(0, False)
    parts = dict(
        keys=kjt.keys(), values=kjt.values(), lengths=kjt.lengths(),
        stride_per_key_per_rank=kjt.stride_per_key_per_rank(),
        inverse_indices=kjt.inverse_indices(),
    )  # fmt: skip
    return KeyedJaggedTensor(**parts | changed)


def other_bag(value):
    """Inverse indices of `of_variable_size` with one of them `value`."""
    names, bags = vbe_batch(0, False).inverse_indices()
    bags = bags.clone()
    bags[names.index("f"), 1] = value
    return names, bags


TOTAL = len(batch(0, False).values())
BAD = {
    "a length beyond the values": (
        lambda: made(lengths=lengths_with(_0=100_000)),
        r"'g' \(table 't'\): a bag has length 100000.*Sum of lengths must equal",
    ),
    "more ids by lengths than values": (
        lambda: made(values=batch(0, False).values()[:-1]),
        rf"Sum of lengths must equal the number of values, but got {TOTAL} and {TOTAL - 1}",
    ),
    "neither lengths nor offsets": (
        lambda: made(lengths=None),
        r"'f' \(table 't', 'p'\), .* have neither lengths nor offsets",
    ),
    "no values": (
        lambda: made(values=torch.zeros(0, dtype=torch.int64)),
        "Sum of lengths must equal the number of values",
    ),
    "a negative length": (
        lambda: made(lengths=lengths_with(_1=-1, _2=3)),
        r"'g' \(table 't'\): a bag has length -1",
    ),
    "lengths whose sum wraps": (
        lambda: made(lengths=lengths_with(_0=HUGE, _1=HUGE, _2=HUGE, _3=HUGE)),
        f"a bag has length {HUGE}",
    ),
    "offsets that do not begin at 0": (
        lambda: made(lengths=None, offsets=offsets_with(start=2)),
        "Expected first offset to be 0, but got 2",
    ),
    "offsets that do not rise": (
        lambda: made(lengths=None, offsets=offsets_with(_3=0)),
        "a bag has length -",
    ),
    "offsets beyond the values": (
        lambda: made(lengths=None, offsets=offsets_with(_24=TOTAL + 7)),
        "Sum of lengths must equal|a bag has length",
    ),
    "offsets other than lengths": (
        lambda: made(offsets=offsets_with(_3=0)),
        "offsets is not equal to the cumulative sum of lengths",
    ),
    "offsets of fewer bags": (
        lambda: made(offsets=offsets_with()[:-2]),
        "have 24 bags|24 bags",
    ),
    "length_per_key too long": (
        lambda: made(length_per_key=[TOTAL, TOTAL, TOTAL, TOTAL]),
        "length_per_key",
    ),
    "length_per_key of the right sum": (
        lambda: made(length_per_key=[TOTAL, 0, 0, 0]),
        rf"length_per_key \[{TOTAL}, 0, 0, 0\] .* is not what their lengths",
    ),
    "length_per_key of fewer features": (
        lambda: made(length_per_key=[TOTAL]),
        "length_per_key",
    ),
    "offset_per_key": (
        lambda: made(offset_per_key=[0, 1, 2, 3, TOTAL]),
        "offset_per_key",
    ),
    "a feature twice": (
        lambda: made(keys=["f", "g", "h", "f"]),
        r"features 'f' \(table 't', 'p'\) more than once, and keys must be unique",
    ),
    "a stride that does not fit": (
        lambda: made(stride=5),
        "have 24 bags, but 20 by their batch sizes",
    ),
    "a missing length": (
        lambda: made(lengths=lengths_with()[:-1], stride=None),
        "have 23 bags, but 20 by their batch sizes",
    ),
    "batch sizes of other features": (
        lambda: made(stride_per_key=[6, 6, 6, 5]),
        "batch sizes",
    ),
    "values in two dimensions": (
        lambda: made(values=torch.zeros(TOTAL, 1, dtype=torch.int64)),
        r"ids of features 'f' \(table 't', 'p'\), .* have shape",
    ),
    "float ids": (
        lambda: made(values=torch.zeros(TOTAL)),
        r"ids of features 'f' \(table 't', 'p'\), .* are torch.float32.* ids.long\(\)",
    ),
    "inverse indices of one batch size": (
        lambda: made(inverse_indices=(KEYS, torch.zeros(4, 5, dtype=torch.int64))),
        "have inverse_indices and one batch size",
    ),
}  # fmt: skip
"""By fault: what makes it, and what the error says."""
VARIABLE = {
    "an inverse index beyond the bags": (
        lambda: of_variable_size(inverse_indices=other_bag(1000)),
        r"'f' \(table 't', 'p'\): inverse_indices have bag 1000",
    ),
    "a negative inverse index": (
        lambda: of_variable_size(inverse_indices=other_bag(-1)),
        "inverse_indices have bag -1",
    ),
    "inverse indices of one dimension": (
        lambda: of_variable_size(inverse_indices=(KEYS, torch.zeros(5, dtype=torch.int64))),
        r"inverse_indices .* \[5\]; give",
    ),
    "batch sizes of more bags": (
        lambda: of_variable_size(stride_per_key_per_rank=[[90], [90], [90], [90]]),
        "bags, but 360 by their batch sizes",
    ),
    "a negative batch size": (
        lambda: of_variable_size(stride_per_key_per_rank=[[-1], [9], [9], [9]]),
        "batch sizes",
    ),
}
WEIGHTED = {
    "fewer weights": (lambda: made(weights=torch.ones(TOTAL - 1)), "weights of features"),
    "more weights": (lambda: made(weights=torch.ones(TOTAL + 1)), "give a weight for each id"),
    "weights of integers": (
        lambda: made(weights=torch.ones(TOTAL, dtype=torch.int64)),
        r"are torch.int64, .*weights.float\(\)",
    ),
    "weights in two dimensions": (
        lambda: made(weights=torch.ones(TOTAL, 2)), r"have shape \[\d+, 2\]"
    ),
}  # fmt: skip
