"""Passes over all ids of a chunk, in blocks: pairs in, new codes and residuals out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from cce_torchrec.codes import pack, widen
from cce_torchrec.hashing import HashFunction
from cce_torchrec.kmeans import native
from cce_torchrec.kmeans.points import PairPoints

_BLOCK = 1 << 18


@dataclass(frozen=True)
class ChunkIds:
    """All ids of one chunk: column `column` of `codes` [N, c], and the helper's hash."""

    codes: torch.Tensor
    column: int
    num_rows: int
    helper_rows: int
    hash: HashFunction

    @property
    def num_ids(self) -> int:
        """N."""
        return self.codes.shape[0]

    @property
    def cells(self) -> int:
        """Possible pairs, k * k'."""
        return self.num_rows * self.helper_rows

    @property
    def _native(self) -> bool:
        return self.codes.device.type == "cpu" and native.available()

    def keys(self, ids: torch.Tensor) -> torch.Tensor:
        """Pair of each of `ids`: code * k' + hash, int64."""
        rows = widen(self.codes[ids, self.column])
        return rows * self.helper_rows + self.hash(ids, self.helper_rows)

    def blocks(self) -> Iterator[torch.Tensor]:
        """All ids in rising order, int64, in blocks."""
        for start in range(0, self.num_ids, _BLOCK):
            yield torch.arange(start, min(start + _BLOCK, self.num_ids), device=self.codes.device)

    def count_pairs(self, weights: torch.Tensor | None = None) -> torch.Tensor:
        """Ids (or their summed int64 `weights` [N]) of every pair, int64 [k * k']."""
        counts = torch.zeros(self.cells, dtype=torch.int64, device=self.codes.device)
        if self._native:
            native.count_pairs(
                self.codes, self.column, self.hash, self.helper_rows, weights, counts
            )
            return counts
        for ids in self.blocks():
            keys = self.keys(ids)
            one = torch.ones_like(keys) if weights is None else weights[ids]
            counts.index_add_(0, keys, one)
        return counts

    def starts(self, sample: HashFunction, count: int, sorted_keys: torch.Tensor) -> torch.Tensor:
        """Positions in `sorted_keys` of up to `count` different pairs, those of hashed ids.

        Drawn from the ids, a pair comes early in proportion to its ids, wherever they live.
        """
        device = self.codes.device
        if self.num_ids <= 8 * count:
            everyone = torch.arange(self.num_ids, device=device)
            drawn = torch.sort(sample.bits31(everyone), stable=True).indices
        else:
            drawn = (sample.bits31(torch.arange(4 * count, device=device)) * self.num_ids) >> 31
        at = torch.searchsorted(sorted_keys, self.keys(drawn)).clamp(max=len(sorted_keys) - 1)
        at = at[sorted_keys[at] == self.keys(drawn)]  # all, unless pairs were sampled
        at = torch.cat([at, torch.arange(min(count, len(sorted_keys)), device=device)])
        order = torch.arange(len(at), device=device)
        first = torch.full((len(sorted_keys),), len(at), device=device)
        first.scatter_reduce_(0, at, order, "amin")
        return at[first[at] == order][:count]


class PairTable:
    """New code of every pair, int32 [k * k']: the final assignment of ids is a lookup."""

    def __init__(self, ids: ChunkIds, keys: torch.Tensor, assignment: torch.Tensor) -> None:
        self._ids = ids
        self._table = torch.zeros(ids.cells, dtype=torch.int32, device=keys.device)
        self._table[keys] = assignment

    def of(self, ids: torch.Tensor) -> torch.Tensor:
        """New codes of `ids`, int64."""
        return self._table[self._ids.keys(ids)].long()

    def changed(self) -> int:
        """Ids whose code is another one."""
        own = self._ids
        if own._native:
            return native.relabel(
                own.codes, own.column, own.hash, own.helper_rows, self._table, False
            )
        return _changed(own, self)

    def residuals(
        self, points: PairPoints, centroids: torch.Tensor, new_hash: HashFunction
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Integer sums [k', s] and numbers [k'] of x_i - centroid by new helper row."""
        own = self._ids
        if own._native:
            return native.residuals(
                *(own.codes, own.column, (own.hash, new_hash)),
                *(points.main, points.helper, centroids, self._table),
            )
        return _residuals(own, self, points, centroids, new_hash)

    def write(self, codes: torch.Tensor) -> None:
        """Rewrites this chunk in `codes`, which hold the present ones, perhaps in a wider type."""
        own = self._ids = replace(self._ids, codes=codes)
        if own._native:
            native.relabel(own.codes, own.column, own.hash, own.helper_rows, self._table, True)
            return
        for ids in own.blocks():
            own.codes[ids, own.column] = pack(self.of(ids), own.codes.dtype)


class CodeColumn:
    """New code of every id, in storage type [N]: for chunks whose pairs hardly repeat."""

    def __init__(self, ids: ChunkIds, column: torch.Tensor) -> None:
        self._ids = ids
        self._column = column

    def of(self, ids: torch.Tensor) -> torch.Tensor:
        """New codes of `ids`, int64."""
        return widen(self._column[ids])

    def changed(self) -> int:
        """Ids whose code is another one."""
        return _changed(self._ids, self)

    def residuals(
        self, points: PairPoints, centroids: torch.Tensor, new_hash: HashFunction
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Integer sums [k', s] and numbers [k'] of x_i - centroid by new helper row."""
        return _residuals(self._ids, self, points, centroids, new_hash)

    def write(self, codes: torch.Tensor) -> None:
        """Rewrites this chunk in `codes`."""
        codes[:, self._ids.column] = self._column


NewCodes = PairTable | CodeColumn


def _changed(own: ChunkIds, new: NewCodes) -> int:
    return sum(
        int((widen(own.codes[ids, own.column]) != new.of(ids)).sum()) for ids in own.blocks()
    )


def _residuals(
    own: ChunkIds,
    new: NewCodes,
    points: PairPoints,
    centroids: torch.Tensor,
    new_hash: HashFunction,
) -> tuple[torch.Tensor, torch.Tensor]:
    sums = torch.zeros(points.helper.shape, dtype=torch.int64, device=points.helper.device)
    sizes = torch.zeros(len(sums), dtype=torch.int64, device=sums.device)
    for ids in own.blocks():
        keys = own.keys(ids)
        x = points.main[keys // own.helper_rows] + points.helper[keys % own.helper_rows]
        rows = new_hash(ids, own.helper_rows)
        sums.index_add_(0, rows, x.long() - centroids[new.of(ids)])
        sizes += torch.bincount(rows, minlength=len(sizes))
    return sums, sizes
