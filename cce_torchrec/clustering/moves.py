"""How many ids a step moved to another cluster, whatever its name, and how even clusters are.

From numbers of ids by pairs (old code, new code), which cross the network where codes do not. Each
old cluster is matched with at most one new one, the pair with most ids first (a greedy matching,
which has at least half the ids of the best): an id has moved if its new cluster is not the one that
its old cluster has become.
"""

from __future__ import annotations

import functools

import torch

from cce_torchrec.clustering.chunk_group import ChunkGroup
from cce_torchrec.clustering.id_passes import PAIR_BLOCK, NewCodes
from cce_torchrec.codes.hashing import mix
from cce_torchrec.kmeans.points import PairPoints

_DENSE = 1 << 19
"""Most pairs of codes that are counted in a table of all, 4 MiB; of more, those that occur."""
_LOOKED_AT = 1 << 21
"""Ids whose old codes are looked at, where K-means saw a sample: a share is right to 0.1 %."""
_SAMPLED = 64
"""Of each new cluster, where pairs of codes are listed."""


class Moves:
    """Counts ids by their codes before and after, of one chunk.

    Args:
        before: main rows that there are.
        after: main rows after the step.
        num_ids: of the table.
        levels: of counts of ids, by which points are told apart.
        device: of codes and points.
    """

    def __init__(
        self, before: int, after: int, *, num_ids: int, levels: int, device: torch.device
    ) -> None:
        self._before, self._after, self._levels = before, after, levels
        self._dense = before * after <= _DENSE
        size = after * (before + 1) if self._dense else after
        self._totals = torch.zeros(size, dtype=torch.int64, device=device)
        self._sizes, self._table = self._totals.split([after, size - after])
        self._keys: list[torch.Tensor] = []
        self._ids: list[torch.Tensor] = []
        # Every so many of them, by their numbers, so that they are the same wherever they are.
        self._stride = max(1, num_ids // (_LOOKED_AT if self._dense else _SAMPLED * after))

    def add_points(self, points: PairPoints, nearest: torch.Tensor, numbers: torch.Tensor) -> None:
        """Takes the pairs of all ids, with the new code of each pair and the number of its ids."""
        for first in range(0, points.num_points, PAIR_BLOCK):
            at = slice(first, first + PAIR_BLOCK)
            new = nearest[at].long()
            self._sizes.index_add_(0, new, numbers[at])
            self._add(points.a[at].long() // self._levels, new, numbers[at])

    def add_codes(self, part: NewCodes) -> None:
        """Takes new codes of this rank's ids, before they are written."""
        for new, old, sampled in part.beside_old(self._stride):
            # Not by bincount, for whose result a host waits.
            self._sizes.index_add_(0, new, torch.ones_like(new))
            self._add(old, sampled, torch.ones_like(sampled))

    def _add(self, old: torch.Tensor, new: torch.Tensor, ids: torch.Tensor) -> None:
        keys = old * self._after + new
        if self._dense:
            self._table.index_add_(0, keys, ids)
            return
        occurs = ids > 0
        self._keys.append(keys[occurs])
        self._ids.append(ids[occurs])

    def share(self, holders: ChunkGroup) -> None:
        """Brings together what the ranks of a ROW_WISE chunk have counted; codes stay there."""
        holders.all_reduce(self._totals)
        if not self._dense:
            none = self._totals[:0]
            self._keys = [holders.gather(torch.cat([none, *self._keys]))]
            self._ids = [holders.gather(torch.cat([none, *self._ids]))]

    @functools.cached_property
    def _found(self) -> torch.Tensor:
        """Ids of each new cluster, once all were counted; read once, as that waits for a device."""
        return self._sizes.cpu()

    @property
    def empty(self) -> int:
        """Main rows that no id reads."""
        return int((self._found == 0).sum())

    @property
    def imbalance(self) -> float:
        """k * sum(c^2) / N^2 of the ids c of each of k clusters."""
        sizes = self._found.double()
        return float(self._after * sizes.square().sum() / sizes.sum().square().clamp(min=1))

    def moved(self) -> float:
        """Share of ids that are not in the cluster that theirs has become."""
        if self._dense:
            keys = self._table.nonzero().view(-1)
            ids = self._table[keys].cpu()
        else:
            none = self._totals[:0]
            keys, places = torch.unique(torch.cat([none, *self._keys]), return_inverse=True)
            ids = torch.zeros_like(keys).index_add_(0, places, torch.cat([none, *self._ids])).cpu()
        total = int(ids.sum())
        return 1 - matched_ids(keys.cpu(), ids, self._after) / total if total else 0.0


def matched_ids(keys: torch.Tensor, ids: torch.Tensor, columns: int) -> int:
    """Ids of pairs that a greedy matching of rows and columns takes.

    Args:
        keys: row * `columns` + column of each pair, int64 [n], all different.
        ids: of each pair, int64 [n].
        columns: that there are.
    """
    # Ties by a hash of the pair: in the order of pairs, each round below would take a single one.
    order = torch.sort(mix(keys)).indices
    order = order[torch.sort(ids[order], descending=True, stable=True).indices]
    keys, ids = keys[order], ids[order]
    most, matched = int(keys.max()) // columns + 1 if len(keys) else 0, 0
    # A round takes all pairs that are first for both their row and their column: what a loop over
    # pairs, one by one, would take as well.
    while len(keys):
        rows, cols = keys // columns, keys % columns
        place = torch.arange(len(keys), device=keys.device)  # a job may have another default
        is_first = _first(rows, most)[rows] == place
        is_first &= _first(cols, columns)[cols] == place
        matched += int(ids[is_first].sum())
        taken = tuple(is_first.new_zeros(size) for size in (most, columns))
        taken[0][rows[is_first]] = True
        taken[1][cols[is_first]] = True
        free = ~(taken[0][rows] | taken[1][cols])
        keys, ids = keys[free], ids[free]
    return matched


def _first(values: torch.Tensor, most: int) -> torch.Tensor:
    """Where each value below `most` comes first."""
    place = torch.arange(len(values), device=values.device)
    return place.new_full((most,), len(values)).scatter_reduce_(0, values, place, "amin")
