"""Agreement of the codes of two tables, whatever their clusters are called."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist

from cce_torchrec.collectives import gather, ranks_of_call

_TERMS = 1 << 22
"""Terms of the expectation that are in memory at a time."""
_SPREAD = 12.0
"""Standard deviations around the mean beyond which a term of the expectation is less than 1e-30."""


class CodeCounts:
    """How many ids have each pair of codes, one of each table: added up in blocks of ids.

    Args:
        rows: of main of the first table and of the second.
    """

    def __init__(self, rows: tuple[int, int]) -> None:
        self.rows = rows
        self._pairs = torch.zeros(0, dtype=torch.int64)
        self._counts = torch.zeros(0, dtype=torch.int64)

    def add(self, first: torch.Tensor, second: torch.Tensor) -> None:
        """Adds ids by their codes, integers [n] of each table.

        Raises:
            ValueError: unequal numbers of ids, or codes that are no rows.
        """
        if len(first) != len(second):
            raise ValueError(f"codes are of {len(first)} and of {len(second)} ids; give the same")
        for codes, rows in ((first, self.rows[0]), (second, self.rows[1])):
            if len(codes) and not (int(codes.min()) >= 0 and int(codes.max()) < rows):
                raise ValueError(
                    f"codes reach from {int(codes.min())} to {int(codes.max())}, and the table has "
                    f"{rows} rows"
                )
        # Pairs that occur, and not a matrix: two tables of 1,024 rows could have a million.
        self._merge(*torch.unique(first.long() * self.rows[1] + second, return_counts=True))

    def of_all_ranks(self, group: dist.ProcessGroup | None = None) -> CodeCounts:
        """The counts over the ids of all ranks, each of which has others. Collective."""
        total = CodeCounts(self.rows)
        for pairs, counts in gather((self._pairs, self._counts), ranks_of_call(group)):
            total._merge(pairs, counts)
        return total

    def table(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Codes of the first table, of the second, and numbers of ids, of all pairs that occur."""
        return self._pairs // self.rows[1], self._pairs % self.rows[1], self._counts

    def _merge(self, pairs: torch.Tensor, counts: torch.Tensor) -> None:
        self._pairs, at = torch.unique(torch.cat([self._pairs, pairs]), return_inverse=True)
        merged = torch.zeros(len(self._pairs), dtype=torch.int64)
        self._counts = merged.index_add_(0, at, torch.cat([self._counts, counts]))


def adjusted_mutual_information(counts: CodeCounts) -> float:
    """Agreement of two tables' codes: mutual information beyond that of chance, over its largest.

    Range: 1 where one is the other, renumbered; 0 on average where ids have codes independently,
    with as many ids a code as they have; below 0 by chance. Invariant to renumbering of each. Two
    tables of which each has one code agree: 1. Cost: the counts, then O(u v w) for u and v
    different numbers of ids a code and w possible numbers of ids a pair.

    Source: Vinh, Epps and Bailey, JMLR 2010; normalised by the mean of both entropies.

    Raises:
        ValueError: there are no ids.
    """
    first, second, joint = counts.table()
    if not len(joint):
        raise ValueError("agreement of codes is one of ids, and there are none")
    n = joint.sum()
    a = torch.zeros(counts.rows[0], dtype=torch.int64).index_add_(0, first, joint)
    b = torch.zeros(counts.rows[1], dtype=torch.int64).index_add_(0, second, joint)
    share = joint.double() / n
    # Of clusters of these sizes, if codes were independent.
    chance = (a[first].double() / n) * (b[second].double() / n)
    information = (share * (share / chance).log()).sum()
    entropies = _entropy(a) + _entropy(b)
    if entropies == 0:  # one code each, renumbered
        return 1.0
    expected = _expected_information(a[a > 0], b[b > 0], int(n))
    largest = entropies / 2
    # Where each id has a code of its own, all is chance.
    if largest - expected < 1e-15 * largest:
        return 1.0 if information >= largest * (1 - 1e-12) else 0.0
    return float((information - expected) / (largest - expected))


def _entropy(sizes: torch.Tensor) -> torch.Tensor:
    share = sizes[sizes > 0].double() / sizes.sum()
    return -(share * share.log()).sum()


def _expected_information(a: torch.Tensor, b: torch.Tensor, n: int) -> torch.Tensor:
    """Mutual information that codes of clusters of these sizes have on average by chance.

    Terms depend on the two sizes alone, so that each pair of sizes is computed once.
    """
    # A few hundred different sizes stand for thousands of clusters.
    sizes_a, times_a = torch.unique(a, return_counts=True)
    sizes_b, times_b = torch.unique(b, return_counts=True)
    x, y = (grid.reshape(-1) for grid in torch.meshgrid(sizes_a, sizes_b, indexing="ij"))
    times = torch.outer(times_a, times_b).reshape(-1).double()
    mean = x.double() * y / n
    deviation = (mean * (1 - x.double() / n) * (1 - y.double() / n)).clamp_min(0).sqrt()
    # Of a hypergeometric distribution, which falls off at least as fast as a normal one beyond.
    low = torch.maximum((x + y - n).clamp_min(1), (mean - _SPREAD * deviation - 60).long())
    high = torch.minimum(torch.minimum(x, y), (mean + _SPREAD * deviation + 60).long())
    widest = int((high - low).max()) + 1
    total = torch.zeros((), dtype=torch.float64)
    for at in torch.arange(len(x)).split(max(1, _TERMS // widest)):
        total += (times[at] * _terms((x[at], y[at]), (low[at], high[at]), n)).sum()
    return total


def _terms(
    sizes: tuple[torch.Tensor, torch.Tensor], between: tuple[torch.Tensor, torch.Tensor], n: int
) -> torch.Tensor:
    """For each pair of sizes: the sum over m of (m / n) log(n m / (x y)) times the chance of m."""
    (x, y), (low, high) = sizes, between
    m = low[:, None] + torch.arange(int((high - low).max()) + 1)
    inside = m <= high[:, None]  # the widest pair sets the columns; others end before
    m = torch.minimum(m, high[:, None]).double()
    x, y = x[:, None].double(), y[:, None].double()
    # By logarithms: factorials of millions of ids are no numbers.
    log = torch.lgamma
    chance = (
        log(x + 1) + log(y + 1) + log(n - x + 1) + log(n - y + 1) - math.lgamma(n + 1)
        - log(m + 1) - log(x - m + 1) - log(y - m + 1) - log(n - x - y + m + 1)
    )  # fmt: skip
    value = (m / n) * (n * m / (x * y)).log() * chance.exp()
    return (value * inside).sum(1)
