"""One pass over a table before it is trained on: rows are counted, values checked, ids numbered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from cce_torchrec.bars import bar
from cce_torchrec.collectives import Ranks
from cce_torchrec.data.files import Piece
from cce_torchrec.data.numbering import Numbering
from cce_torchrec.data.table_files import TableFiles


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared differences from it, of each dense column, float64 [d]."""

    count: np.ndarray
    mean: np.ndarray
    squares: np.ndarray

    @classmethod
    def of(cls, dense: np.ndarray) -> Moments:
        """Of `dense` [n, d], without values that are missing."""
        there = ~np.isnan(dense)
        count = there.sum(axis=0)
        mean = np.where(there, dense, 0.0).sum(axis=0) / np.maximum(count, 1)
        squares = np.where(there, dense - mean, 0.0) ** 2
        return cls(count, mean, squares.sum(axis=0))

    def and_of(self, other: Moments) -> Moments:
        """Of both (Chan et al., 1979): plain sums of squares would lose what is left of them."""
        count = self.count + other.count
        apart, part = other.mean - self.mean, other.count / np.maximum(count, 1)
        squares = self.squares + other.squares + apart**2 * self.count * part
        return Moments(count, self.mean + apart * part, squares)


@dataclass
class Scan:
    """What the pass has found."""

    numberings: list[Numbering]
    """By feature."""
    train: list[int] = field(default_factory=list)
    """Rows to train on, by piece."""
    validation: list[int] = field(default_factory=list)
    """Rows that validate, by piece."""
    mean: list[float] = field(default_factory=list)
    deviation: list[float] = field(default_factory=list)
    """Of each dense column, in rows to train on; 1 where all values are the same."""


def scan(
    parts: Sequence[tuple[TableFiles, Piece]], numberings: list[Numbering], ranks: Ranks
) -> Scan:
    """The pass over the pieces of one table, or of two that have the same columns. Collective.

    Args:
        numberings: by feature, of which nothing was seen yet.

    Raises:
        ValueError: on every rank, if a value of any is bad.
    """
    own_parts = range(ranks.rank, len(parts), ranks.size)
    shown = bar(len(own_parts), "counting rows and ids", "piece")

    def own() -> tuple[dict[int, tuple[int, int, Moments]], list[np.ndarray]]:
        # Each rank reads some of the pieces; a row's part in the split needs no other piece.
        counts = {}
        for n in own_parts:
            counts[n] = _piece(parts[n][0], parts[n][1], numberings)
            shown.update()
        shown.close()
        return counts, [numbering.seen() for numbering in numberings]

    by_rank = ranks.agree(own)
    # Every rank merges all of them, and so numbers ids alike.
    for numbering, *seen in zip(numberings, *(seen for _, seen in by_rank), strict=True):
        numbering.merge(seen)
    counts = {n: count for found, _ in by_rank for n, count in found.items()}
    # In the order of the pieces, so that sums are the same on any number of ranks.
    train, validation, moments = zip(*(counts[n] for n in range(len(parts))), strict=True)
    total = moments[0]  # a table without pieces is refused before
    for more in moments[1:]:
        total = total.and_of(more)
    spread = np.sqrt(total.squares / np.maximum(total.count, 1))
    # A column of one value is left as it is.
    deviation = np.where(spread > 0, spread, 1.0).tolist()
    return Scan(numberings, list(train), list(validation), total.mean.tolist(), deviation)


def _piece(
    table: TableFiles, piece: Piece, numberings: Sequence[Numbering]
) -> tuple[int, int, Moments]:
    """Rows of a piece that train and that validate, and the former's moments."""
    train, validation = 0, 0
    moments = Moments.of(np.zeros((0, len(table.options.dense))))
    for values in table.values(piece, numberings):
        held = table.validates(piece, train + validation, len(values))
        kept = values.select(~held)
        for numbering, whole, key in zip(numberings, values.keys, kept.keys, strict=True):
            numbering.see(whole, key)
        moments = moments.and_of(Moments.of(kept.dense))
        train, validation = train + len(kept), validation + int(held.sum())
    return train, validation, moments
