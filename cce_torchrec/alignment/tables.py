"""Two tables of the same ids: all measures of alignment between them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
import torch.distributed as dist

from cce_torchrec.alignment.agreement import CodeCounts, adjusted_mutual_information
from cce_torchrec.alignment.ids import Names, drawn, ranges, same_names
from cce_torchrec.alignment.measures import GROUPS, SAMPLE, Alignment, all_measures
from cce_torchrec.alignment.moments import grouped_moments
from cce_torchrec.alignment.neighbours import neighbourhoods
from cce_torchrec.collectives import agree, ranks_of_call

BLOCK = 16384
"""Most ids whose vectors are read at once."""


class Table(Protocol):
    """What gives the vectors of ids."""

    num_embeddings: int
    embedding_dim: int

    def embeddings(self, ids: torch.Tensor) -> torch.Tensor:
        """Vectors [n, embedding_dim] of `ids` [n], which ascend."""


@runtime_checkable
class CodedTable(Table, Protocol):
    """A table whose chunks have learned codes."""

    num_chunks: int
    num_rows: int

    def codes(self, first: int, last: int) -> torch.Tensor:
        """Main rows of ids [first, last), int64 [ids, chunks]; `first` is a multiple of 8."""


@dataclass(frozen=True)
class Weight:
    """A table that is in memory: a plain one, or what a layer gave for examples.

    Args:
        weight: [N, D], of floating point.
    """

    weight: torch.Tensor

    def __post_init__(self) -> None:
        """Refuses what is no table.

        Raises:
            ValueError: not of two dimensions, or of integers.
        """
        if self.weight.dim() != 2 or not self.weight.is_floating_point():
            raise ValueError(
                "a table is [ids, dimension] of floating point, and this is "
                f"{list(self.weight.shape)} of {self.weight.dtype}"
            )

    @property
    def num_embeddings(self) -> int:
        """N."""
        return len(self.weight)

    @property
    def embedding_dim(self) -> int:
        """D."""
        return self.weight.shape[1]

    def embeddings(self, ids: torch.Tensor) -> torch.Tensor:
        """Its rows."""
        return self.weight.detach()[ids.to(self.weight.device)]


def align(
    a: Table,
    b: Table,
    *,
    counts: torch.Tensor | None = None,
    common: bool = False,
    names: tuple[Names, Names] | None = None,
    max_ids: int | None = None,
    k: int = 10,
    sample: int = SAMPLE,
    process_group: dist.ProcessGroup | None = None,
) -> Alignment:
    """All measures of alignment between two tables of the same ids.

    Vectors are read in blocks, each id once, and `sample` ids more for their neighbours. With ranks
    each reads its share of the blocks, and sums cross the network; every rank gets the same result.
    All ranks look at the neighbours of the same sample. Collective where there is a process group.

    Args:
        a: of N ids.
        b: of N ids, and of any dimension.
        counts: [N], how often each id is looked up, by which it weighs in all but the neighbours
            and the codes. Ids with 0 do not count.
        common: compare the ids that both have, the first ones, where one table has more.
        names: of all ids of a and of b, texts or whole numbers: ids of the same name are compared,
            whatever their numbers, and those of one table alone are left out.
        max_ids: at most how many ids are added up, drawn by a hash; default: all. Codes are
            compared over all ids in any case, from counts.
        k: neighbours of an id.
        sample: ids whose neighbours are looked at, drawn by a hash: the same ones of any tables.

    Raises:
        ValueError: unequal numbers of ids without `common`, fewer than two ids, constant vectors,
            values that are not finite, or counts that are none of these ids.
    """
    group = ranks_of_call(process_group)
    of_b: torch.Tensor | None = None
    of_a: torch.Tensor | range
    if names is None:
        of_a = range(_common(a, b, common))
    else:
        of_a, of_b = same_names(names, (a.num_embeddings, b.num_embeddings))
    ids = len(of_a)
    _check_counts(counts, ids if names is None else a.num_embeddings)
    pairs = _Pairs(a, b, of_a, of_b)
    if max_ids is not None and max_ids < 2:
        raise ValueError(f"max_ids={max_ids} leaves nothing to compare; give 2 or more")
    chosen = range(ids) if max_ids is None or max_ids >= ids else drawn(ids, max_ids)
    parts = grouped_moments(_blocks(pairs, chosen, counts, group), GROUPS, group)
    near = None
    own = drawn(ids, sample)
    if len(own) >= k + 2:
        x, y = (_exact(vectors).cpu() for vectors in pairs.embeddings(own))
        near = neighbourhoods(x, y, k)
    return all_measures(parts, near, _codes(pairs, group))


def _common(a: Table, b: Table, common: bool) -> int:
    ids = min(a.num_embeddings, b.num_embeddings)
    if a.num_embeddings != b.num_embeddings and not common:
        raise ValueError(
            f"the tables have {a.num_embeddings:,} and {b.num_embeddings:,} ids; with common=True "
            f"(--common) the first {ids:,}, which both have, are compared"
        )
    return ids


def _check_counts(counts: torch.Tensor | None, ids: int) -> None:
    if counts is None:
        return
    if counts.shape != (ids,):
        raise ValueError(f"counts of shape {tuple(counts.shape)} are given of {ids:,} ids")
    if not (torch.isfinite(counts).all() and (counts >= 0).all() and (counts > 0).any()):
        raise ValueError(
            "counts say how often each id is looked up: give finite numbers of 0 or more, not all 0"
        )


def _exact(vectors: torch.Tensor) -> torch.Tensor:
    """In a type that products are made in: float32 of half precision."""
    return vectors if vectors.dtype == torch.float64 else vectors.float()


class _Pairs:
    """What is compared with what: the i-th pair is an id of a and one of b."""

    def __init__(
        self, a: Table, b: Table, of_a: torch.Tensor | range, of_b: torch.Tensor | None
    ) -> None:
        self.tables = a, b
        self.count = len(of_a)
        # None: pair i is id i of both.
        self._ids = None if isinstance(of_a, range) or of_b is None else (of_a, of_b)
        self._codes: list[torch.Tensor] = []

    def ids(self, at: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids of a and of b of the pairs `at` [n], which ascend."""
        return (at, at) if self._ids is None else (self._ids[0][at], self._ids[1][at])

    def embeddings(self, at: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Vectors [n, p] and [n, q] of the pairs `at` [n]."""
        x, y = (_read(table, own) for table, own in zip(self.tables, self.ids(at), strict=True))
        return x, y

    def codes(self, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes [n, chunks] of both of the pairs [first, last); `first` is a multiple of 8."""
        a, b = self.tables
        assert isinstance(a, CodedTable) and isinstance(b, CodedTable)
        if self._ids is None:
            return a.codes(first, last), b.codes(first, last)
        if not self._codes:  # codes are read by ranges of ids, and names pick any
            self._codes = [_all_codes(table) for table in (a, b)]
        ids = self.ids(torch.arange(first, last))
        one, other = (codes[own] for codes, own in zip(self._codes, ids, strict=True))
        return one, other


def _read(table: Table, ids: torch.Tensor) -> torch.Tensor:
    """Vectors of `ids` in their order, read in ascending order."""
    order = ids.argsort()
    found = table.embeddings(ids[order])
    return found[order.argsort().to(found.device)]


def _all_codes(table: CodedTable) -> torch.Tensor:
    size = 1 << 16
    ends = [
        (first, min(table.num_embeddings, first + size))
        for first in range(0, table.num_embeddings, size)
    ]
    return torch.cat([table.codes(first, last) for first, last in ends])


def _blocks(
    pairs: _Pairs,
    chosen: torch.Tensor | range,
    counts: torch.Tensor | None,
    group: dist.ProcessGroup | None,
) -> Iterator[tuple[torch.Tensor, ...]]:
    # Of few ids small blocks, so that each part has some.
    size = max(1, min(BLOCK, len(chosen) // (2 * GROUPS)))
    for first, last in ranges(len(chosen), size, group):
        # As many on every rank, as lookups of sharded tables want it; the last ones again.
        at = torch.arange(first, first + size if group is not None else last)
        at = at.clamp_(max=len(chosen) - 1)
        own = at if isinstance(chosen, range) else chosen[at]
        x, y = (vectors[: last - first] for vectors in pairs.embeddings(own))
        y = y.to(x.device)
        if counts is None:
            yield x, y
        else:
            yield x, y, counts[pairs.ids(own)[0][: last - first]].to(x.device)


def _codes(pairs: _Pairs, group: dist.ProcessGroup | None) -> list[float] | None:
    a, b = pairs.tables
    if not (isinstance(a, CodedTable) and isinstance(b, CodedTable)):
        return None
    if a.num_chunks != b.num_chunks:
        return None
    one, other = a, b

    def counted() -> list[CodeCounts]:
        found = [CodeCounts((one.num_rows, other.num_rows)) for _ in range(one.num_chunks)]
        for first, last in ranges(pairs.count, 1 << 16, group):
            pair = pairs.codes(first, last)
            for chunk, counts in enumerate(found):
                counts.add(*(codes[:, chunk] for codes in pair))
        return found

    own, _ = agree(lambda: (counted(), None), group)
    return [adjusted_mutual_information(counts.of_all_ranks(group)) for counts in own]
