"""The pairs of a chunk: which K-means sees, and how they cross to ranks that help to score."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import torch.distributed as dist

from cce_torchrec.clustering.budget import ASSIGN_BLOCK, Budget
from cce_torchrec.clustering.chunk import ChunkState
from cce_torchrec.clustering.ids import ChunkIds, IdWeights, NewCodes
from cce_torchrec.codes import pack
from cce_torchrec.hashing import SAMPLE_ROLE, HashFunction, hash_function
from cce_torchrec.kmeans.points import PairPoints
from cce_torchrec.kmeans.share import agreed


@dataclass
class Sampled:
    """The pairs of a chunk that K-means runs over, and where they come from."""

    ids: ChunkIds
    keys: torch.Tensor
    """int64 [P], rising."""
    points: PairPoints
    pair_of_id: torch.Tensor | None
    """int32 [N], where the pairs of all ids were listed: position in `keys`."""


def find_pairs(state: ChunkState, plan: Budget, weights: IdWeights | None = None) -> Sampled:
    """Distinct pairs of the chunk's ids (or of a sample of them, drawn by hash)."""
    ids, config = state.ids, state.codes.config
    sample = hash_function(config.seed, config.name, state.chunk, SAMPLE_ROLE, state.codes.rounds)
    pair_of_id = None
    if plan.by_pair:
        grid = ids.count_pairs()
        keys = grid.nonzero().view(-1)
        counts = (grid if weights is None else ids.count_pairs(weights))[keys]
        del grid
    else:
        most = None
        if plan.samples_per_centroid is not None:
            most = plan.samples_per_centroid * state.num_clusters
        taken, weight = _list_ids(ids, sample, most, weights)
        keys, inverse = torch.unique(taken, return_inverse=True)
        del taken
        counts = torch.zeros_like(keys).index_add_(0, inverse, weight)
        if plan.samples_per_centroid is None:
            pair_of_id = inverse.int()
    if not bool(counts.any()):
        counts = torch.ones_like(counts)  # nothing was seen: uniform, as without weights
    starts = ids.starts(sample, state.num_clusters * (4 if weights is not None else 1), keys)
    if weights is not None:
        starts = starts[counts[starts] > 0]
    weight_ = state.weight.detach()
    main, helper = weight_[: config.num_rows], weight_[config.num_rows :]
    a, b = (keys // ids.helper_rows).int(), (keys % ids.helper_rows).int()
    return Sampled(ids, keys, PairPoints(main, helper, a, b, counts, starts), pair_of_id)


def _list_ids(
    ids: ChunkIds, sample: HashFunction, most: int | None, weights: IdWeights | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pair and weight of every id, or of about `most` sampled ones; int64 each."""
    share = 1.0 if most is None else min(1.0, most / ids.num_ids)
    keys, counts = [], []
    for first, last in ids.blocks():
        block = ids.range(first, last)
        taken = slice(None) if share == 1.0 else sample.bits31(block) < round(share * 2**31)
        keys.append(ids.keys(block[taken]))
        if weights is not None:
            counts.append(weights.of(first, last)[taken])
    listed = torch.cat(keys)
    if not len(listed):  # a handful of ids, all hashed above the threshold
        listed = ids.keys(ids.range(0, min(ids.num_ids, ids.num_rows)))
        return listed, torch.ones_like(listed)
    if weights is None:
        return listed, listed.new_ones(()).expand(len(listed))
    return listed, torch.cat(counts)


def codebooks_only(state: ChunkState, plan: Budget, weights: IdWeights | None = None) -> Sampled:
    """The chunk without pairs, for scoring its ids in blocks; arguments as `find_pairs`."""
    num_rows, weight = state.codes.config.num_rows, state.weight.detach()
    none = torch.zeros(0, dtype=torch.int32, device=weight.device)
    rest = (none, none, none.long(), none.long())
    points = PairPoints(weight[:num_rows], weight[num_rows:], *rest)
    return Sampled(state.ids, none.long(), points, None)


def of_all_ids(sampled: Sampled, assignment: torch.Tensor) -> NewCodes:
    """New codes of all ids, where K-means saw all their pairs."""
    ids = sampled.ids
    if sampled.pair_of_id is None:
        return NewCodes.of_pairs(ids, sampled.keys, assignment)
    packed = pack(assignment, ids.codes.dtype)[sampled.pair_of_id]
    return NewCodes(ids, packed, False, 0, ids.num_ids)


@dataclass
class IdBlock:
    """The pairs of one block of ids, from id `first` on."""

    ids: ChunkIds
    first: int
    points: PairPoints
    pair_of_id: torch.Tensor

    @classmethod
    def of(cls, sampled: Sampled, first: int) -> IdBlock:
        """The block of `ASSIGN_BLOCK` ids, or what is left."""
        ids, books = sampled.ids, sampled.points
        block = ids.range(first, min(first + ASSIGN_BLOCK, ids.num_ids))
        keys, inverse = torch.unique(ids.keys(block), return_inverse=True)
        a, b = (keys // ids.helper_rows).int(), (keys % ids.helper_rows).int()
        rest = (a, b, torch.ones_like(keys), keys[:0])
        points = PairPoints.from_integers(books.main, books.helper, books.scale, *rest)
        return cls(ids, first, points, inverse)

    def new_codes(self, nearest: torch.Tensor) -> NewCodes:
        """New codes of these ids, from the nearest centroid of their pairs."""
        packed = pack(nearest, self.ids.codes.dtype)[self.pair_of_id]
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

    out, parts = agreed(room, device=device, group=group)
    for part in parts:
        dist.broadcast(part, source, group=group)
    return out
