"""From the clusters of pairs to new codes of ids."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from cce_torchrec.clustering.budget import assign_block
from cce_torchrec.clustering.chunk_state import ChunkState
from cce_torchrec.clustering.id_passes import ChunkIds, NewCodes, keys_of_rows, rows_of_keys
from cce_torchrec.clustering.pairs import ChunkPairs, points_over
from cce_torchrec.codes.whole_codes import whole
from cce_torchrec.kmeans.points import PairPoints


def of_all_ids(ids: ChunkIds, pairs: ChunkPairs, assignment: torch.Tensor) -> Iterator[NewCodes]:
    """New codes of all ids that are here, where K-means saw the pairs of all of them."""
    points, codes = pairs.points, whole(assignment, ids.packing.bits)
    if pairs.by_pair:
        yield NewCodes.of_pairs(ids, points, codes)
        return
    if pairs.pair_of_id is not None:
        yield NewCodes(ids, codes[pairs.pair_of_id], False, ids.local.start, ids.local.stop)
        return
    # The list was put together from those of several ranks: each finds its own pairs in it.
    keys = keys_of_rows(points.a, points.b, ids.helper_rows)
    for first, last in ids.blocks(assign_block(ids.codes.device, points.dim)):
        at = torch.searchsorted(keys, ids.keys(ids.range(first, last)))
        yield NewCodes(ids, codes[at], False, first, last)


def codebooks_only(state: ChunkState) -> ChunkPairs:
    """The chunk without pairs, for scoring its ids in blocks; collective as `find_pairs`."""

    def without_pairs() -> ChunkPairs:
        none = torch.zeros(0, dtype=torch.int32, device=state.weight.device)
        longs = none.long()
        return ChunkPairs(points_over(state, a=none, b=none, weights=longs, starts=longs))

    if not state.owned:
        return ChunkPairs(state.holders.receive(state.shape))
    return state.holders.send(without_pairs)


@dataclass
class PairBatch:
    """The pairs of one block of ids, from id `first` on."""

    ids: ChunkIds
    first: int
    points: PairPoints
    pair_of_id: torch.Tensor | None
    """Position of each id's pair among the points; None where every id is a point."""

    @classmethod
    def from_block(cls, ids: ChunkIds, books: PairPoints, first: int) -> PairBatch:
        """The pairs of `assign_block` ids, or of what is left, over the codebooks of `books`.

        Pairs of a block hardly repeat where K-means saw a sample of them: on a GPU, where finding
        those that do takes longer than scoring them, every id is a point.
        """
        last = min(first + assign_block(ids.codes.device, books.dim), ids.local.stop)
        if ids.on_gpu:
            a, b = ids.gpu_range(first, last).pairs()
            none = a[:0].long()
            rest = (a, b, none.new_ones(()).expand(len(a)), none)
            points = PairPoints.from_integers(books.main, books.helper, books.scale, *rest)
            return cls(ids, first, points, None)
        block = ids.range(first, last)
        keys, inverse = torch.unique(ids.keys(block), return_inverse=True)
        a, b = (rows.int() for rows in rows_of_keys(keys, ids.helper_rows, ids.levels))
        rest = (a, b, torch.ones_like(keys), keys[:0])
        points = PairPoints.from_integers(books.main, books.helper, books.scale, *rest)
        return cls(ids, first, points, inverse)

    def new_codes(self, nearest: torch.Tensor) -> NewCodes:
        """New codes of these ids, from the nearest centroid of their pairs."""
        codes = whole(nearest, self.ids.packing.bits)
        if self.pair_of_id is not None:
            codes = codes[self.pair_of_id]
        return NewCodes(self.ids, codes, False, self.first, self.first + len(codes))
