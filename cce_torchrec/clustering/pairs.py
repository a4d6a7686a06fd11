"""The pairs of a chunk: which K-means sees, and how they cross to ranks that help to score."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import torch.distributed as dist

from cce_torchrec.clustering.budget import Budget, assign_block, sample_room
from cce_torchrec.clustering.chunk import ChunkState
from cce_torchrec.clustering.id_passes import (
    GPU_ID_BLOCK,
    ChunkIds,
    IdWeights,
    NewCodes,
    starting_pairs,
)
from cce_torchrec.codes.hashing import SAMPLE_ROLE, HashFunction, hash_function
from cce_torchrec.codes.storage import pack
from cce_torchrec.collectives import together
from cce_torchrec.kmeans.points import PairPoints

_KEY_BLOCK = 1 << 24
"""Pairs that are converted at once, so that temporaries stay small beside them."""


@dataclass
class Sampled:
    """The pairs of a chunk that K-means runs over, and where they come from."""

    ids: ChunkIds
    points: PairPoints
    pair_of_id: torch.Tensor | None
    """int32 [N], where the pairs of all ids were listed: position in `keys`."""


def sample_hash(state: ChunkState) -> HashFunction:
    """What ids are sampled and drawn by."""
    config = state.codes.config
    return hash_function(
        config.seed, config.name, state.chunk, SAMPLE_ROLE, state.codes.num_clusterings
    )


def most_ids(state: ChunkState, plan: Budget) -> int | None:
    """About how many ids K-means sees; None for all."""
    if plan.samples_per_centroid is None:
        return None
    return plan.samples_per_centroid * state.num_clusters


def find_pairs(state: ChunkState, plan: Budget, weights: IdWeights | None = None) -> Sampled:
    """Distinct pairs of the chunk's ids (or of a sample of them, drawn by hash)."""
    ids, sample, pair_of_id = state.ids, sample_hash(state), None
    if plan.by_pair:
        grid = ids.count_pairs()
        keys = grid.nonzero().view(-1)
        counts = taken_at(grid if weights is None else ids.count_pairs(weights), keys)
        del grid
    else:
        taken, weight = list_ids(ids, sample, most_ids(state, plan), weights)
        if not len(taken):  # a handful of ids, all hashed above the threshold
            taken = ids.keys(ids.range(0, min(ids.num_ids, ids.num_rows)))
            weight = torch.ones_like(taken)
        keys, inverse = torch.unique(taken, return_inverse=True)
        del taken
        counts = torch.zeros_like(keys).index_add_(0, inverse, weight)
        if plan.samples_per_centroid is None:
            pair_of_id = inverse.int()
    drawn = ids.keys(ids.drawn(sample, starts_wanted(state, weights)))
    return Sampled(ids, points_of(state, keys, counts, drawn, weights), pair_of_id)


def taken_at(table: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """`table[keys]` as int64, without another copy of its size."""
    out = torch.empty_like(keys)
    for first in range(0, len(keys), _KEY_BLOCK):
        at = slice(first, first + _KEY_BLOCK)
        out[at] = table[keys[at]]
    return out


def rows_of_keys(keys: torch.Tensor, helper_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Main and helper rows, int32, of pairs main * k' + helper."""
    a = torch.empty_like(keys, dtype=torch.int32)
    b = torch.empty_like(a)
    for first in range(0, len(keys), _KEY_BLOCK):
        at = slice(first, first + _KEY_BLOCK)
        a[at], b[at] = keys[at] // helper_rows, keys[at] % helper_rows
    return a, b


def starts_wanted(state: ChunkState, weights: IdWeights | None) -> int:
    """How many pairs to draw that K-means may start from; some may weigh nothing."""
    return state.num_clusters * (4 if weights is not None else 1)


def points_of(
    state: ChunkState,
    keys: torch.Tensor,
    counts: torch.Tensor,
    drawn: torch.Tensor,
    weights: IdWeights | None,
) -> PairPoints:
    """The pairs `keys`, with their ids or weights, as points; `drawn`: pairs of drawn ids."""
    if not bool(counts.any()):
        counts = torch.ones_like(counts)  # nothing was seen: uniform, as without weights
    starts = starting_pairs(drawn, starts_wanted(state, weights), keys)
    if weights is not None:
        starts = starts[counts[starts] > 0]
    num_rows, helper_rows = state.codes.config.num_rows, state.codes.config.helper_rows
    weight = state.weight.detach()
    a, b = rows_of_keys(keys, helper_rows)
    books = weight[:num_rows], weight[num_rows:]
    return PairPoints(*books, a=a, b=b, weights=counts, starts=starts)


def list_ids(
    ids: ChunkIds, sample: HashFunction, most: int | None, weights: IdWeights | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pair and weight of every id that is held, or of the sampled ones; int64 each.

    Sampled are about `most` of all ids of the table.
    """
    share = 1.0 if most is None else min(1.0, most / ids.num_ids)
    if ids.on_gpu and share < 1.0:
        return _sample_on_gpu(ids, sample, share, weights)
    if ids.on_gpu:
        every = ids.gpu_range(ids.held.start, ids.held.stop).keys()
        if weights is None:
            return every, every.new_ones(()).expand(len(every))
        return every, weights.of(ids.held.start, ids.held.stop)
    keys, counts = [ids.codes.new_empty(0, dtype=torch.int64)], []
    for first, last in ids.blocks():
        block = ids.range(first, last)
        taken = slice(None) if share == 1.0 else sample.bits31(block) < round(share * 2**31)
        keys.append(ids.keys(block[taken]))
        if weights is not None:
            counts.append(weights.of(first, last)[taken])
    listed = torch.cat(keys)
    if weights is None or not counts:
        return listed, listed.new_ones(()).expand(len(listed))
    return listed, torch.cat(counts)


def _sample_on_gpu(
    ids: ChunkIds, sample: HashFunction, share: float, weights: IdWeights | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`list_ids` of a sample, in any order; two passes if more are drawn than were expected."""
    room, found = sample_room(len(ids.held), share), 0
    while True:
        keys = torch.empty(room, dtype=torch.int64, device=ids.codes.device)
        sums = None if weights is None else torch.empty_like(keys)
        count = torch.zeros(1, dtype=torch.int64, device=ids.codes.device)
        for first, last in ids.blocks(len(ids.held) if weights is None else GPU_ID_BLOCK):
            weight = None if weights is None else weights.of(first, last)
            part = ids.gpu_range(first, last)
            part.sampled(sample, round(share * 2**31), weight, keys, sums, count)
        found = int(count)
        if found <= room:
            listed = keys[:found]
            return listed, listed.new_ones(()).expand(found) if sums is None else sums[:found]
        room = found


def codebooks_only(state: ChunkState, plan: Budget, weights: IdWeights | None = None) -> Sampled:
    """The chunk without pairs, for scoring its ids in blocks; arguments as `find_pairs`."""
    num_rows, weight = state.codes.config.num_rows, state.weight.detach()
    none = torch.zeros(0, dtype=torch.int32, device=weight.device)
    books = weight[:num_rows], weight[num_rows:]
    points = PairPoints(*books, a=none, b=none, weights=none.long(), starts=none.long())
    return Sampled(state.ids, points, None)


def of_all_ids(sampled: Sampled, assignment: torch.Tensor) -> NewCodes:
    """New codes of all ids, where K-means saw all their pairs."""
    ids = sampled.ids
    if sampled.pair_of_id is None:
        return NewCodes.of_pairs(ids, sampled.points, assignment)
    packed = pack(assignment, ids.codes.dtype)[sampled.pair_of_id]
    return NewCodes(ids, packed, False, ids.held.start, ids.held.stop)


@dataclass
class PairBatch:
    """The pairs of one block of ids, from id `first` on."""

    ids: ChunkIds
    first: int
    points: PairPoints
    pair_of_id: torch.Tensor | None
    """Position of each id's pair among the points; None where every id is a point."""

    @classmethod
    def of(cls, sampled: Sampled, first: int) -> PairBatch:
        """The block of `assign_block` ids, or what is left.

        Pairs of a block hardly repeat where K-means saw a sample of them: on a GPU, where finding
        those that do takes longer than scoring them, every id is a point.
        """
        ids, books = sampled.ids, sampled.points
        last = min(first + assign_block(ids.codes.device, books.dim), ids.held.stop)
        if ids.on_gpu:
            a, b = ids.gpu_range(first, last).pairs()
            none = a[:0].long()
            rest = (a, b, none.new_ones(()).expand(len(a)), none)
            points = PairPoints.from_integers(books.main, books.helper, books.scale, *rest)
            return cls(ids, first, points, None)
        block = ids.range(first, last)
        keys, inverse = torch.unique(ids.keys(block), return_inverse=True)
        a, b = rows_of_keys(keys, ids.helper_rows)
        rest = (a, b, torch.ones_like(keys), keys[:0])
        points = PairPoints.from_integers(books.main, books.helper, books.scale, *rest)
        return cls(ids, first, points, inverse)

    def new_codes(self, nearest: torch.Tensor) -> NewCodes:
        """New codes of these ids, from the nearest centroid of their pairs."""
        packed = pack(nearest, self.ids.codes.dtype)
        if self.pair_of_id is not None:
            packed = packed[self.pair_of_id]
        return NewCodes(self.ids, packed, False, self.first, self.first + len(packed))


def broadcast(
    points: PairPoints | None,
    rows: tuple[int, int, int],
    owner: int,
    device: torch.device,
    group: dist.ProcessGroup,
) -> PairPoints | None:
    """The owner's points on every rank, bit for bit: codebooks, pairs and counts, no codes.

    None on every rank where the owner has failed. `rows`: k, k' and width.

    Raises:
        ValueError: on every rank, if there is no room for them on any.
    """
    source = dist.get_global_rank(group, owner)
    header = torch.full((3,), -1, device=device)
    if points is not None:
        exponent = round(math.log2(points.scale))  # a power of two
        sizes = (points.num_points, len(points.starts(1 << 40)), exponent)
        header = torch.tensor(sizes, device=device)
    dist.broadcast(header, source, group=group)
    num_points, num_starts, exponent = header.tolist()
    if num_points < 0:
        return None

    def room() -> tuple[PairPoints, list[torch.Tensor]]:
        out = points
        if out is None:
            num_rows, helper_rows, dim = rows
            empty = functools.partial(torch.empty, device=device, dtype=torch.int32)
            shapes = (num_rows, dim), (helper_rows, dim), (num_points,), (num_points,)
            main, helper, a, b = (empty(shape) for shape in shapes)
            longs = [empty(n, dtype=torch.int64) for n in (num_points, num_starts)]
            out = PairPoints.from_integers(main, helper, 2.0**exponent, a, b, *longs)
        parts = (out.main, out.helper, out.a, out.b, out.weights, out.starts(1 << 40))
        return out, [part.contiguous() for part in parts]

    out, parts = together(room, device=device, group=group)
    for part in parts:
        dist.broadcast(part, source, group=group)
    return out
