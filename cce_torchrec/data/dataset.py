"""What the training program reads: examples by the batch, here from a data set in memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:  # pandas comes with the extra `demo`; the synthetic data set needs none
    import pandas as pd


@dataclass(frozen=True)
class Bags:
    """Ids of a feature that has any number of them: `values` int64 [V], `lengths` int64 [n]."""

    values: torch.Tensor
    lengths: torch.Tensor

    def take(self, index: torch.Tensor) -> Bags:
        """The bags of the rows `index`."""
        lengths = self.lengths[index]
        starts = (self.lengths.cumsum(0) - self.lengths)[index]
        # Where each value is: the start of its bag, and on from there.
        shift = (starts - (lengths.cumsum(0) - lengths)).repeat_interleave(lengths)
        return Bags(self.values[shift + torch.arange(len(shift))], lengths)


@dataclass(frozen=True)
class Rows:
    """Shapes: `dense` float32 [n, d], `ids` int64 [n, features], `labels` float32 [n].

    `bags` are the features with several ids a row, which come after those of `ids`.
    """

    dense: torch.Tensor
    ids: torch.Tensor
    labels: torch.Tensor
    bags: tuple[Bags, ...] = ()

    def __len__(self) -> int:
        return self.labels.numel()

    def take(self, index: torch.Tensor) -> Rows:
        """The rows `index`."""
        bags = tuple(bag.take(index) for bag in self.bags)
        return Rows(self.dense[index], self.ids[index], self.labels[index], bags)


@dataclass(frozen=True, kw_only=True)
class Share:
    """Which part of each batch a rank has: parts of a batch differ by one example at most."""

    batch_size: int
    """Of all ranks together."""
    rank: int = 0
    world_size: int = 1

    def part(self, num_rows: int) -> range:
        """This rank's part of a batch of `num_rows`, as `torch.tensor_split` would cut it."""
        each, rest = divmod(num_rows, self.world_size)
        start = self.rank * each + min(self.rank, rest)
        return range(start, start + each + (self.rank < rest))


class Examples(ABC):
    """A data set and its split, as the training program reads it, from memory or from a disk."""

    name: str
    features: dict[str, int]
    """Categorical features in order, with their numbers of ids."""
    compressed: list[str]
    """Features whose tables a compression method replaces."""

    @property
    @abstractmethod
    def num_train(self) -> int:
        """Examples to train on."""

    @property
    @abstractmethod
    def num_dense(self) -> int:
        """Dense features, 1 or more."""

    def steps(self, batch_size: int) -> int:
        """Optimizer steps of an epoch; the examples that fill no batch are left out of it."""
        return max(1, self.num_train // batch_size)

    @abstractmethod
    def batches(self, share: Share, *, seed: int, epoch: int, done: int = 0) -> Iterator[Rows]:
        """This rank's part of each batch of an epoch from the `done`-th on, `steps` in all.

        The order depends on seed and epoch, and on nothing that was read before.
        """

    @abstractmethod
    def validation_batches(self, share: Share) -> Iterator[Rows]:
        """This rank's part of each batch of the examples that validate, the same number on all."""


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """Random numbers of the order of an epoch."""
    # Not torch's own generator: a resumed run draws the order anew, whatever was drawn between.
    return torch.Generator().manual_seed(seed * 1_000_003 + epoch)


@dataclass(frozen=True)
class Dataset(Examples):
    """A data set in memory."""

    name: str
    features: dict[str, int]
    compressed: list[str]
    train: Rows
    validation: Rows

    @property
    def num_train(self) -> int:
        """Examples to train on."""
        return len(self.train)

    @property
    def num_dense(self) -> int:
        """Dense features."""
        return self.train.dense.shape[1]

    def batches(self, share: Share, *, seed: int, epoch: int, done: int = 0) -> Iterator[Rows]:
        """Batches of all examples in random order."""
        order = torch.randperm(len(self.train), generator=epoch_generator(seed, epoch))
        for index in order.split(share.batch_size)[done : self.steps(share.batch_size)]:
            part = share.part(len(index))
            yield self.train.take(index[part.start : part.stop])

    def validation_batches(self, share: Share) -> Iterator[Rows]:
        """Batches of the examples that validate, in their order."""
        for index in torch.arange(len(self.validation)).split(share.batch_size):
            part = share.part(len(index))
            yield self.validation.take(index[part.start : part.stop])


def require_columns(frame: pd.DataFrame, columns: list[str], where: Path) -> None:
    """Raises ValueError, naming what is missing, unless `frame` of `where` has `columns`."""
    missing = [column for column in columns if column not in frame.columns]
    if missing:
        raise ValueError(f"{where} lacks columns {missing}; it has {list(frame.columns)}")


def distinct_ids(frame: pd.DataFrame, columns: list[str]) -> tuple[np.ndarray, int]:
    """Ids without gaps of the distinct combinations of `columns`, and their number."""
    # Without dropna=False a row where a column is empty would get no id.
    codes = frame.groupby(columns, observed=True, sort=True, dropna=False).ngroup().to_numpy()
    return codes.astype(np.int64), int(codes.max()) + 1


def random_split(num_rows: int, share: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Row numbers of training, and of the random `share` of `num_rows` that validates."""
    order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed))
    num_validation = int(num_rows * share)
    return order[num_validation:], order[:num_validation]
