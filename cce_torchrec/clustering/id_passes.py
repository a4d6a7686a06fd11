"""Passes over all ids of a chunk, in blocks: pairs in, new codes and residuals out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from cce_torchrec.codes.counts import LEVELS, levels_of
from cce_torchrec.codes.hashing import HashFunction
from cce_torchrec.codes.storage import column_of, seen_ids
from cce_torchrec.codes.whole_codes import rows_of
from cce_torchrec.gpu.usable import usable
from cce_torchrec.kmeans import native
from cce_torchrec.kmeans.points import PairPoints
from cce_torchrec.packing import CodePacking

if TYPE_CHECKING:  # Triton may not be installed
    from cce_torchrec.clustering import triton_kernel

ID_BLOCK = 1 << 16
"""Ids of a block of the torch form; the kernels take all ids at once."""
PAIR_BLOCK = 1 << 24
"""Pairs whose place in a table of all pairs is found at once."""
GPU_WRITE_BLOCK = 1 << 22
"""Ids whose new codes are packed at once on a GPU: 16 MiB of int32, and temporaries of as much."""
GPU_ID_BLOCK = 1 << 25
"""Ids whose weights are read at once on a GPU: 256 MiB of int64."""


@dataclass(frozen=True)
class IdWeights:
    """How much each id counts: integers [N], or the bits of seen ids (see `codes.mark_seen`)."""

    values: torch.Tensor
    bits: bool
    base: int = 0
    """Id of the first bit."""

    def of(self, first: int, last: int) -> torch.Tensor:
        """int64 weights of ids [first, last); `first` is a multiple of 8."""
        if not self.bits:
            return self.values[first:last].long().contiguous()
        # Blocks begin at multiples of 8 (ID_BLOCK, and ROW_WISE parts): their bits begin at a byte.
        first, last = first - self.base, last - self.base
        return seen_ids(self.values[first // 8 : -(-last // 8)], last - first).long()


@dataclass(frozen=True, kw_only=True)
class ChunkIds:
    """Ids of one chunk that a rank holds: a column of packed `codes`, and the helper's hash."""

    codes: torch.Tensor
    packing: CodePacking
    column: int
    num_rows: int
    helper_rows: int
    hash: HashFunction
    local: range
    """Neighbouring ids, in the order of `codes`."""
    num_ids: int
    """N, of the whole table."""
    counts: torch.Tensor | None = None
    """Of the ids that are here, by whose levels pairs are told apart; see counts.py."""

    @property
    def levels(self) -> int:
        """Of counts; 1 without them."""
        return 1 if self.counts is None else LEVELS

    @property
    def cells(self) -> int:
        """Possible pairs, k * k' of each level."""
        return self.num_rows * self.levels * self.helper_rows

    @property
    def compiled(self) -> bool:
        """Whether passes run compiled."""
        return self.codes.device.type == "cpu" and native.available()

    @property
    def on_gpu(self) -> bool:
        """Whether passes run in Triton."""
        return not self.compiled and usable(self.codes.device)

    def gpu_range(self, first: int, last: int) -> triton_kernel.Range:
        """Ids [first, last) for the Triton kernels."""
        from cce_torchrec.clustering.triton_kernel import Range

        return Range(
            codes=self.codes,
            packing=self.packing,
            column=self.column,
            base=self.local.start,
            first=first,
            last=last,
            hash=self.hash,
            helper_rows=self.helper_rows,
            counts=self.counts,
        )

    def native_column(self, first: int, last: int) -> native.Column:
        """Ids [first, last) for the compiled kernels."""
        return native.Column(
            codes=self.codes,
            packing=self.packing,
            column=self.column,
            first=first,
            last=last,
            base=self.local.start,
            counts=self.counts,
        )

    def keys(self, ids: torch.Tensor) -> torch.Tensor:
        """Pair of each of `ids`: (code * levels + level) * k' + hash, int64."""
        rows = self.rows_of(ids)
        if self.counts is not None:
            rows = rows * LEVELS + levels_of(self.counts, ids - self.local.start)
        return rows * self.helper_rows + self.hash(ids, self.helper_rows)

    def rows_of(self, ids: torch.Tensor) -> torch.Tensor:
        """Main rows of `ids`, int64."""
        width = self.packing.width
        own = self.codes[:, self.column * width : (self.column + 1) * width]
        return self.packing.read(own, ids - self.local.start, 1).view(-1)

    def rows(self, first: int, last: int) -> torch.Tensor:
        """Main rows of ids [first, last), int64."""
        base = self.local.start
        return column_of(self.codes, self.packing, self.column, first - base, last - base)

    def range(self, first: int, last: int) -> torch.Tensor:
        """Ids [first, last), int64."""
        return torch.arange(first, last, device=self.codes.device)

    def blocks(self, size: int = ID_BLOCK) -> Iterator[tuple[int, int]]:
        """All ids that are here in ranges [first, last) of `size` ids."""
        size = max(1, size)  # a rank may hold no ids (ROW_WISE)
        for first in self.local[::size]:
            yield first, min(first + size, self.local.stop)

    def count_pairs(self, weights: IdWeights | None = None) -> torch.Tensor:
        """Ids (or their summed weights) of every pair [k * k'], int64 or, on a GPU, int32."""
        dtype = self.count_type(weights is not None)
        counts = torch.zeros(self.cells, dtype=dtype, device=self.codes.device)
        if self.on_gpu:
            for first, last in self.blocks(len(self.local) if weights is None else GPU_ID_BLOCK):
                weight = None if weights is None else weights.of(first, last)
                self.gpu_range(first, last).count(weight, counts)
            return counts
        for first, last in self.blocks():
            weight = None if weights is None else weights.of(first, last)
            if self.compiled:
                column = self.native_column(first, last)
                column.count_pairs(self.hash, self.helper_rows, weight, counts)
                continue
            keys = self.keys(self.range(first, last))
            counts.index_add_(0, keys, torch.ones_like(keys) if weight is None else weight)
        return counts

    def count_type(self, weighted: bool) -> torch.dtype:
        """Type of counts of pairs: on a GPU, where they are many, int32 if numbers of ids fit."""
        fits = self.on_gpu and not weighted and self.num_ids < 1 << 31
        return torch.int32 if fits else torch.int64

    def drawn(self, sample: HashFunction, count: int) -> torch.Tensor:
        """Ids of the whole table in hashed order, or many times `count` that are drawn by hash."""
        device = self.codes.device
        # Sorting all ids by hash gives `count` different ones for sure; for large tables it would
        # cost more than the rest, and draws by hash repeat few.
        if self.num_ids <= 8 * count:
            everyone = torch.arange(self.num_ids, device=device)
            return torch.sort(sample.bits31(everyone), stable=True).indices
        return (sample.bits31(torch.arange(4 * count, device=device)) * self.num_ids) >> 31


def rows_of_keys(
    keys: torch.Tensor, helper_rows: int, levels: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of the points' codebooks, int64, of pairs: main by level, and helper level by level."""
    a, b = keys // helper_rows, keys % helper_rows
    return a, b if levels == 1 else b + a % levels * helper_rows


def keys_of_rows(a: torch.Tensor, b: torch.Tensor, helper_rows: int) -> torch.Tensor:
    """The inverse of `rows_of_keys`, int64."""
    return a.long() * helper_rows + b % helper_rows


def starting_pairs(drawn: torch.Tensor, count: int, sorted_keys: torch.Tensor) -> torch.Tensor:
    """Positions in `sorted_keys` of up to `count` different pairs, those of `drawn` ids first.

    Drawn from the ids, a pair comes early in proportion to its ids, wherever they live.
    """
    device = drawn.device
    at = torch.searchsorted(sorted_keys, drawn).clamp(max=len(sorted_keys) - 1)
    at = at[sorted_keys[at] == drawn]  # all, unless pairs were sampled
    at = torch.cat([at, torch.arange(min(count, len(sorted_keys)), device=device)])
    order = torch.arange(len(at), device=device)
    first = torch.full((len(sorted_keys),), len(at), device=device)
    first.scatter_reduce_(0, at, order, "amin")
    return at[first[at] == order][:count]


@dataclass(frozen=True)
class NewCodes:
    """New codes of ids [first, last), whole (see whole_codes.py): of every pair or each id."""

    ids: ChunkIds
    codes: torch.Tensor
    """[k * k'] of pairs, [last - first] of ids."""
    by_pair: bool
    first: int
    last: int

    @classmethod
    def of_pairs(cls, ids: ChunkIds, points: PairPoints, assignment: torch.Tensor) -> NewCodes:
        """Of all ids that are here, by lookup of their pairs among `points`; whole assignment."""
        # Pairs that no id has are never looked up, so that zero does for them.
        table = torch.zeros(ids.cells, dtype=assignment.dtype, device=points.a.device)
        for first in range(0, points.num_points, PAIR_BLOCK):
            at = slice(first, first + PAIR_BLOCK)
            keys = keys_of_rows(points.a[at], points.b[at], ids.helper_rows)
            table[keys] = assignment[at]
        return cls(ids, table, True, ids.local.start, ids.local.stop)

    def of(self, first: int, last: int) -> torch.Tensor:
        """New codes of ids [first, last), int64."""
        if not self.by_pair:
            return rows_of(self.codes[first - self.first : last - self.first])
        return rows_of(self.codes[self.ids.keys(self.ids.range(first, last))])

    def _blocks(self, size: int = ID_BLOCK) -> Iterator[tuple[int, int]]:
        for first in range(self.first, self.last, size):
            yield first, min(first + size, self.last)

    def changed(self) -> int | torch.Tensor:
        """Ids whose code is another one; on a GPU int64 [1], which is not waited for."""
        own = self.ids
        if own.compiled:
            return self._relabel(write=False)
        if own.on_gpu:
            changed = torch.zeros(1, dtype=torch.int64, device=self.codes.device)
            part = own.gpu_range(self.first, self.last)
            part.count_changed(self.codes, self.by_pair, changed)
            return changed
        return sum(int((own.rows(i, j) != self.of(i, j)).sum()) for i, j in self._blocks())

    def beside_old(self, stride: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """New codes of all ids; old and new codes of every `stride`-th; int64, in blocks."""
        own = self.ids
        for first, last in self._blocks(GPU_WRITE_BLOCK if own.on_gpu else ID_BLOCK):
            new = self.of(first, last)
            if stride == 1:
                yield new, own.rows(first, last), new
                continue
            ids = torch.arange(first + -first % stride, last, stride, device=new.device)
            yield new, own.rows_of(ids), new[ids - first]

    def write(self) -> None:
        """Rewrites the codes in place."""
        own = self.ids
        if own.compiled:
            self._relabel(write=True)
            return
        for first, last in self._blocks(GPU_WRITE_BLOCK if own.on_gpu else ID_BLOCK):
            new = self._of_on_gpu(first, last) if own.on_gpu else self.of(first, last)
            own.packing.write(own.codes, own.column, first - own.local.start, new)

    def _of_on_gpu(self, first: int, last: int) -> torch.Tensor:
        """New codes of ids [first, last), int32."""
        # A table over pairs is one for all blocks, a list of ids is cut like them.
        codes = self.codes if self.by_pair else self.codes[first - self.first : last - self.first]
        return self.ids.gpu_range(first, last).new_codes(codes, self.by_pair)

    def _relabel(self, write: bool) -> int:
        column, own = self.ids.native_column(self.first, self.last), self.ids
        return column.relabel(self.codes, self.by_pair, own.hash, own.helper_rows, write)

    def add_residuals(
        self,
        points: PairPoints,
        centroids: torch.Tensor,
        new_hash: HashFunction,
        stats: tuple[torch.Tensor, torch.Tensor],
    ) -> None:
        """Adds x_i - centroid, in integers, to (sums [k', s], numbers [k']) by new helper row."""
        own, (sums, sizes) = self.ids, stats
        if own.compiled:
            hashes, books = (own.hash, new_hash), (points.main, points.helper, centroids)
            column = own.native_column(self.first, self.last)
            column.residuals(self.codes, self.by_pair, hashes, books, stats)
            return
        if own.on_gpu:
            books = (points.main, points.helper, centroids)
            part = own.gpu_range(self.first, self.last)
            part.residuals(self.codes, self.by_pair, new_hash, books, stats)
            return
        for first, last in self._blocks():
            ids = own.range(first, last)
            keys, rows = own.keys(ids), new_hash(ids, own.helper_rows)
            a, b = rows_of_keys(keys, own.helper_rows, own.levels)
            x = points.main[a] + points.helper[b]
            sums.index_add_(0, rows, (x - centroids[self.of(first, last)]).long())
            sizes += torch.bincount(rows, minlength=len(sizes))
