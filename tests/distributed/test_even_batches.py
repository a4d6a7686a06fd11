"""Ranks with unequal numbers of batches take the same number of steps."""

from __future__ import annotations

import pytest
import torch
from torchrec import KeyedJaggedTensor
from torchrec.distributed.train_pipeline import TrainPipelineBase, TrainPipelineSparseDist

from cce_torchrec import even_batches
from tests.support.models import CPU, KEYS, MEAN, Batch, Loss, batch, shard, tables
from tests.support.ranks import on_ranks

NUMBERS = [[3, 5, 4], [2, 0, 7], [0, 0, 0], [6, 5, 5]]
"""Batches of ranks 0, 1 and 2."""


class WithoutLength:
    """A stream, whose end nobody knows before it comes."""

    def __init__(self, items):
        self._items = items

    def __iter__(self):
        return iter(self._items)


class Stream(torch.utils.data.IterableDataset):
    """A data set without a length."""

    def __init__(self, items):
        self._items = items

    def __iter__(self):
        return iter(self._items)


def loader(items):
    return torch.utils.data.DataLoader(Stream(items), batch_size=None)


@on_ranks(1, 2, 3)
@pytest.mark.parametrize("numbers", NUMBERS)
@pytest.mark.parametrize("form", [list, WithoutLength, loader])
def test_every_rank_ends_where_the_first_does(rank, world_size, numbers, form):
    own = [10 * rank + step for step in range(numbers[rank])]
    assert list(even_batches(form(own))) == own[: min(numbers[:world_size])]


@on_ranks(1, 2, 3)
@pytest.mark.parametrize("numbers", NUMBERS)
@pytest.mark.parametrize("form", [list, iter])
def test_with_empty_every_rank_goes_on_to_the_last(rank, world_size, numbers, form):
    own = [10 * rank + step for step in range(numbers[rank])]
    steps = max(numbers[:world_size])
    found = list(even_batches(form(own), empty=lambda: -1))
    assert found == own + [-1] * (steps - len(own))


@on_ranks(2, 3)
def test_lengths_may_be_known_to_some_ranks_only(rank, world_size):
    own = range(2 + rank) if rank else iter(range(4))
    assert list(even_batches(own)) == [0, 1, 2]


@on_ranks(2)
def test_epochs_follow_one_another(rank, world_size):
    for epoch in range(3):
        assert len(list(even_batches(iter(range(2 + rank + epoch))))) == 2 + epoch


def empty_batch():
    none = torch.zeros(0, dtype=torch.int64)
    # Of the types that other batches have, as ranks send each other both.
    return Batch(KeyedJaggedTensor(KEYS, none, lengths=none, stride=0))


class Sum(Loss):
    """A loss that is 0 of no example."""

    def forward(self, data):
        out = self.over(self.collection(data.ids).values())
        return out.square().sum(), out.detach()


@on_ranks(2, 3)
@pytest.mark.parametrize("numbers", [[3, 5, 4], [2, 0, 7]])
@pytest.mark.parametrize("empty", [None, empty_batch])
@pytest.mark.parametrize("pipeline", [TrainPipelineSparseDist, TrainPipelineBase])
def test_pipelines_end_together(rank, world_size, numbers, empty, pipeline):
    model = shard(Sum(), tables(MEAN), "tw")
    dense = [p for name, p in model.named_parameters() if "over" in name]
    running = pipeline(model, torch.optim.SGD(dense, lr=0.1), CPU)
    own = (Batch(batch(10 * step + rank, False)) for step in range(numbers[rank]))
    source, steps = even_batches(own, empty=empty), 0
    while True:
        try:
            running.progress(source)
        except StopIteration:
            break
        steps += 1
    everyone = numbers[:world_size]
    assert steps == (min(everyone) if empty is None else max(everyone))
    assert all(p.isfinite().all() for p in dense)


@on_ranks(2, 3)
@pytest.mark.parametrize("after", [0, 2])
def test_a_reader_that_fails_raises_on_every_rank(rank, world_size, after):
    def reads():
        yield from range(after)
        if rank == 1:
            raise OSError("the disk is gone")
        yield from range(9)

    seen = []
    with pytest.raises((OSError, ValueError)) as raised:
        for one in even_batches(reads()):
            seen.append(one)
    assert len(seen) == after
    expected = "the disk is gone" if rank == 1 else "the batches of 1 ranks failed"
    assert expected in str(raised.value)


@on_ranks(2)
def test_ranks_that_disagree_about_empty_are_refused(rank, world_size):
    with pytest.raises(ValueError, match=r"by rank .*\[True, False\]; give it on all or on none"):
        even_batches([1], empty=empty_batch if rank == 0 else None)


class Short(list):
    """Has fewer than its length says."""

    def __len__(self):
        return 5


@on_ranks(1, 2)
def test_a_length_that_is_wrong_is_told(rank, world_size):
    batches = even_batches(Short([1, 2, 3]))
    with pytest.raises(ValueError, match=r"len\(batches\) is 5 and there were 3"):
        list(batches)
    assert list(even_batches(iter(Short([1, 2, 3])))) == [1, 2, 3]
