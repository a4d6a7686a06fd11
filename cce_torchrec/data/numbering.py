"""How the keys of a feature become ids from 0 on: as they are, by a vocabulary, or by a hash."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import numpy as np
import torch

from cce_torchrec.codes.hashing import mix
from cce_torchrec.data.values import Keys, check_plain

MAX_PLAIN_ID = 2**31 - 1
UNKNOWN = 0
"""The id of a missing value, and of one that the vocabulary lacks; of no other value."""


class Numbering(ABC):
    """Ids of a feature: what a scan of the files finds of them, and then the ids themselves."""

    @property
    @abstractmethod
    def num_ids(self) -> int:
        """Ids of the feature."""

    @abstractmethod
    def check(self, found: Keys, column: str) -> None:
        """Raises `BadValue` of the first key that can be no id."""

    @abstractmethod
    def see(self, found: Keys, trained: Keys) -> None:
        """Takes notice of the keys of some rows, and of those among them to train on."""

    @abstractmethod
    def seen(self) -> np.ndarray:
        """What was seen, int64."""

    @abstractmethod
    def merge(self, seen: list[np.ndarray]) -> None:
        """Takes over what all ranks have seen."""

    @abstractmethod
    def ids(self, found: Keys) -> np.ndarray:
        """The ids, int64 [V]."""


@dataclass
class PlainIds(Numbering):
    """Integers that are ids as they are."""

    largest: int = -1

    @property
    def num_ids(self) -> int:
        """One more than the largest."""
        return self.largest + 1

    def check(self, found: Keys, column: str) -> None:
        """Refuses what is missing or negative."""
        check_plain(found, column)

    def see(self, found: Keys, trained: Keys) -> None:
        """Notes the largest id, of rows that validate too: each needs a row of the table."""
        self.largest = max(self.largest, int(found.values.max(initial=-1)))

    def seen(self) -> np.ndarray:
        """The largest id."""
        return np.array([self.largest])

    def merge(self, seen: list[np.ndarray]) -> None:
        """The largest of all."""
        self.largest = max(self.largest, *(int(one[0]) for one in seen))

    def ids(self, found: Keys) -> np.ndarray:
        """The keys."""
        return found.values


@dataclass
class Vocabulary(Numbering):
    """Keys of the rows to train on, numbered from 1 in their order as integers."""

    keys: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """Sorted, without repetition."""
    numbers: np.ndarray | None = None
    """The id of each key, int64; None where it is 1 and the position."""
    _new: list[np.ndarray] = field(default_factory=list)

    @property
    def num_ids(self) -> int:
        """One more than there are keys."""
        return len(self.keys) + 1

    def check(self, found: Keys, column: str) -> None:
        """Any key can be one."""

    def see(self, found: Keys, trained: Keys) -> None:
        """Adds the keys of rows to train on; those of others alone would have untrained rows."""
        self._new.append(np.unique(trained.values[~trained.missing]))
        # Not at every block: each time all keys are sorted.
        if sum(map(len, self._new[1:])) > max(1 << 17, len(self._new[0])):
            self._join_new()

    def _join_new(self) -> None:
        self._new = [np.unique(np.concatenate(self._new))] if self._new else []

    def seen(self) -> np.ndarray:
        """The keys that were seen."""
        self._join_new()
        return self._new.pop() if self._new else np.zeros(0, dtype=np.int64)

    def merge(self, seen: list[np.ndarray]) -> None:
        """The keys of all, and those that were there before, whose ids stay."""
        before, numbers = self.keys, self.numbers
        self.keys = np.unique(np.concatenate([before, *seen]))
        if numbers is not None:
            new = ~np.isin(self.keys, before, assume_unique=True)
            self.numbers = np.empty(len(self.keys), dtype=np.int64)
            self.numbers[~new] = numbers
            self.numbers[new] = np.arange(len(before) + 1, len(self.keys) + 1)

    def all_numbers(self) -> np.ndarray:
        """The id of each key, int64."""
        return np.arange(1, len(self.keys) + 1) if self.numbers is None else self.numbers

    def extend(self, keys: np.ndarray, numbers: np.ndarray) -> None:
        """Takes over an earlier vocabulary, whose keys are sorted; new keys get the ids after it.

        To be called before anything is seen, and with the same on every rank.
        """
        self.keys, self.numbers = keys, numbers

    def ids(self, found: Keys) -> np.ndarray:
        """1 and the position among the keys, or UNKNOWN."""
        # Bisection of a sorted array: a dictionary would take ten times the memory.
        place = np.searchsorted(self.keys, found.values)
        there = np.append(self.keys, 0)[place] == found.values
        known = there & (place < len(self.keys)) & ~found.missing
        ids = place + 1 if self.numbers is None else np.append(self.numbers, 0)[place]
        return np.where(known, ids, UNKNOWN)


@dataclass
class HashedIds(Numbering):
    """Keys hashed into ids from 1 to `size` - 1, which may share one."""

    size: int

    @property
    def num_ids(self) -> int:
        """As many as were asked for."""
        return self.size

    def check(self, found: Keys, column: str) -> None:
        """Any key can be one."""

    def see(self, found: Keys, trained: Keys) -> None:
        """Nothing is noted."""

    def seen(self) -> np.ndarray:
        """Nothing."""
        return np.zeros(0, dtype=np.int64)

    def merge(self, seen: list[np.ndarray]) -> None:
        """Nothing is taken over."""

    def ids(self, found: Keys) -> np.ndarray:
        """By SplitMix64's mixing of the key, as `CCEEmbeddingBagConfig(hash_ids=True)` hashes."""
        # Upper bits: integers that differ in few bits have keys that do.
        mixed = mix(torch.from_numpy(found.values)).numpy().view(np.uint64) >> np.uint64(1)
        hashed = (mixed % np.uint64(self.size - 1)).astype(np.int64) + 1
        return np.where(found.missing, UNKNOWN, hashed)


def numbering_of(ids: str, text: bool, hash_size: int) -> Numbering:
    """How a feature is numbered, before anything was seen.

    Args:
        ids: as in `TableOptions`.
        text: whether its values are text, not integers.
    """
    if ids == "hash":
        return HashedIds(hash_size)
    return Vocabulary() if text or ids == "vocabulary" else PlainIds()
