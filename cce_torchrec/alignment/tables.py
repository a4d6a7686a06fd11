"""Two tables of the same ids: all measures of alignment between them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
import torch.distributed as dist

from cce_torchrec.alignment.agreement import CodeCounts, adjusted_mutual_information
from cce_torchrec.alignment.interval import Interval, jackknife
from cce_torchrec.alignment.linear import (
    debiased_cka,
    linear_cka,
    mean_cca,
    procrustes_distance,
    svcca,
)
from cce_torchrec.alignment.moments import grouped_moments
from cce_torchrec.alignment.neighbours import Neighbourhoods, neighbourhoods
from cce_torchrec.codes.hashing import hash_function
from cce_torchrec.collectives import agree, ranks_of_call

GROUPS = 32
"""Parts of the ids by which intervals are found."""
BLOCK = 16384
"""Most ids whose vectors are read at once."""
SAMPLE = 4096
"""Ids whose neighbours are looked at."""
_ROLE = 98
"""Parts the hash by which ids are drawn from all others."""


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


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """How two tables are aligned; of each measure see the function of its name."""

    ids: int
    linear_cka: Interval
    debiased_cka: Interval | None
    """None where ids are weighted."""
    procrustes_distance: Interval
    mean_cca: Interval
    svcca: Interval
    neighbours: Neighbourhoods | None
    """None of fewer ids than that takes."""
    codes: list[float] | None
    """`adjusted_mutual_information` of each chunk, where both tables have codes of as many."""


def align(
    a: Table,
    b: Table,
    *,
    counts: torch.Tensor | None = None,
    common: bool = False,
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
        k: neighbours of an id.
        sample: ids whose neighbours are looked at, drawn by a hash: the same ones of any tables.

    Raises:
        ValueError: unequal numbers of ids without `common`, fewer than two ids, constant vectors,
            values that are not finite, or counts of other ids.
    """
    group = ranks_of_call(process_group)
    ids = _common(a, b, common)
    if counts is not None and len(counts) != ids:
        raise ValueError(f"{len(counts):,} counts are given of {ids:,} ids")
    parts = grouped_moments(_blocks(a, b, ids, counts, group), GROUPS, group)
    drawn = _drawn(ids, sample)
    near = None
    if len(drawn) >= k + 2:
        near = neighbourhoods(a.embeddings(drawn), b.embeddings(drawn), k)
    return Alignment(
        ids=ids,
        linear_cka=jackknife(linear_cka, parts),
        # An estimate of at most n - n / 32 ids, too, wants four.
        debiased_cka=None if counts is not None or ids < 8 else jackknife(debiased_cka, parts),
        procrustes_distance=jackknife(procrustes_distance, parts),
        mean_cca=jackknife(mean_cca, parts),
        svcca=jackknife(svcca, parts),
        neighbours=near,
        codes=_codes(a, b, ids, group),
    )


def _common(a: Table, b: Table, common: bool) -> int:
    ids = min(a.num_embeddings, b.num_embeddings)
    if a.num_embeddings != b.num_embeddings and not common:
        raise ValueError(
            f"the tables have {a.num_embeddings:,} and {b.num_embeddings:,} ids; with common=True "
            f"(--common) the first {ids:,}, which both have, are compared"
        )
    return ids


def _ranges(ids: int, size: int, group: dist.ProcessGroup | None) -> Iterator[tuple[int, int]]:
    """This rank's share of the blocks of ids, as many as every other's: the last may be empty."""
    rank, ranks = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    for begin in range(0, ids, ranks * size):
        first = min(ids, begin + rank * size)
        yield first, min(ids, first + size)


def _blocks(
    a: Table, b: Table, ids: int, counts: torch.Tensor | None, group: dist.ProcessGroup | None
) -> Iterator[tuple[torch.Tensor, ...]]:
    # Of few ids small blocks, so that each part has some.
    size = max(1, min(BLOCK, ids // (2 * GROUPS)))
    for first, last in _ranges(ids, size, group):
        # As many on every rank, as lookups of sharded tables want it; the last ones again.
        own = torch.arange(first, first + size if group is not None else last).clamp(max=ids - 1)
        block = [table.embeddings(own)[: last - first] for table in (a, b)]
        yield (*block, counts[first:last]) if counts is not None else tuple(block)


def _drawn(ids: int, sample: int) -> torch.Tensor:
    if ids <= sample:
        return torch.arange(ids)
    return torch.unique(hash_function(0, "", 0, role=_ROLE)(torch.arange(sample), ids))


def _codes(a: Table, b: Table, ids: int, group: dist.ProcessGroup | None) -> list[float] | None:
    if not (isinstance(a, CodedTable) and isinstance(b, CodedTable)):
        return None
    if a.num_chunks != b.num_chunks:
        return None
    one, other = a, b

    def counted() -> list[CodeCounts]:
        found = [CodeCounts((one.num_rows, other.num_rows)) for _ in range(one.num_chunks)]
        for first, last in _ranges(ids, 1 << 16, group):
            pair = one.codes(first, last), other.codes(first, last)
            for chunk, counts in enumerate(found):
                counts.add(*(codes[:, chunk] for codes in pair))
        return found

    own, _ = agree(lambda: (counted(), None), group)
    return [adjusted_mutual_information(counts.of_all_ranks(group)) for counts in own]
