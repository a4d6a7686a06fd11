"""The pairs of a chunk that K-means sees, and how often ids have them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from cce_torchrec.clustering.budget import Budget, sample_room
from cce_torchrec.clustering.chunk_group import ChunkGroup
from cce_torchrec.clustering.chunk_state import ChunkState
from cce_torchrec.clustering.id_passes import (
    GPU_ID_BLOCK,
    ChunkIds,
    IdWeights,
    rows_of_keys,
    starting_pairs,
)
from cce_torchrec.codes.counts import shrinkage
from cce_torchrec.codes.hashing import SAMPLE_ROLE, HashFunction, hash_function
from cce_torchrec.kmeans.points import PairPoints, check_finite, scale_of

_KEY_BLOCK = 1 << 24
"""Pairs that are converted at once, so that temporaries stay small beside them."""


@dataclass
class ChunkPairs:
    """The pairs of a chunk that K-means runs over."""

    points: PairPoints
    by_pair: bool = False
    """Whether they were counted in a table of all pairs."""
    pair_of_id: torch.Tensor | None = None
    """int32 [N]: position of each id's pair, where the pairs of all ids were listed on one rank."""
    ids: torch.Tensor | None = None
    """int64: how many ids have each pair, on the owner, if all were counted and weigh otherwise."""

    @property
    def numbers(self) -> torch.Tensor:
        """How many ids have each pair, where all ids were looked at; on the owner."""
        return self.points.weights if self.ids is None else self.ids


def sample_hash(state: ChunkState) -> HashFunction:
    """What ids are sampled and drawn by."""
    config = state.codes.config
    return hash_function(
        config.seed,
        config.name,
        state.chunk,
        role=SAMPLE_ROLE,
        round_=state.codes.num_clusterings,
    )


def most_ids(state: ChunkState, plan: Budget) -> int | None:
    """About how many ids K-means sees; None for all."""
    if plan.samples_per_centroid is None:
        return None
    return plan.samples_per_centroid * state.num_clusters


def find_pairs(state: ChunkState, plan: Budget, weights: IdWeights | None = None) -> ChunkPairs:
    """Distinct pairs of the chunk's ids (or of a sample of them, drawn by hash).

    Collective among the ranks that hold its codes: each looks through its own ids, and all get
    the same pairs.
    """
    ids, sample, holders = state.ids, sample_hash(state), state.holders
    pair_of_id: torch.Tensor | None = None
    numbers: torch.Tensor | None = None
    if plan.by_pair:
        keys, counts, numbers = _counted(ids, weights, holders)
    else:
        keys, counts, inverse = _listed(ids, sample, most_ids(state, plan), weights, holders)
        if plan.samples_per_centroid is None and not state.row_wise:
            pair_of_id = inverse.int()
        del inverse
    if weights is not None and not _any_weight(counts, holders):
        return find_pairs(state, plan)  # of ids that count nothing, each counts as much as another
    # Starts are drawn by the hash of ids, not by a generator: the same ones on any number of ranks.
    drawn = holders.together(lambda: _drawn(ids, sample, starts_wanted(state, weights)))
    holders.all_reduce(drawn)
    if not holders.owned:
        return ChunkPairs(holders.receive(state.shape), plan.by_pair)

    def found() -> ChunkPairs:
        points = points_of(state, keys, counts, drawn, weights)
        return ChunkPairs(points, plan.by_pair, pair_of_id, numbers)

    return holders.send(found)


def _any_weight(counts: torch.Tensor, holders: ChunkGroup) -> bool:
    """Whether any of the owner's `counts` is not 0."""
    some = holders.together(lambda: (counts.any() & holders.owned).long())
    return bool(holders.all_reduce(some))


def _counted(
    ids: ChunkIds, weights: IdWeights | None, holders: ChunkGroup
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Pairs of all ids, rising, their ids or weights, and with weights also their ids.

    int64, on the owner.
    """
    grid = holders.reduce(holders.together(ids.count_pairs))
    keys = holders.together(lambda: grid.nonzero().view(-1))
    numbers = None
    if weights is not None:
        numbers = holders.together(lambda: taken_at(grid, keys))
        del grid  # as large as the next one
        grid = holders.reduce(holders.together(lambda: ids.count_pairs(weights)))
    return keys, holders.together(lambda: taken_at(grid, keys)), numbers


def _listed(
    ids: ChunkIds,
    sample: HashFunction,
    most: int | None,
    weights: IdWeights | None,
    holders: ChunkGroup,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `_counted`, from a list of the pairs of ids; and where in it the pair of each id is."""
    taken, weight = holders.together(lambda: list_ids(ids, sample, most, weights))
    if not int(holders.all_reduce(torch.tensor(len(taken), device=holders.device))):
        # A handful of ids, all hashed above the threshold.
        taken, weight = holders.together(lambda: _first_ids(ids))
    keys, inverse = holders.together(partial(torch.unique, taken, return_inverse=True))
    del taken  # one number for each id that was listed
    counts = holders.together(lambda: _added_up(keys, inverse, weight))
    if holders.group is None:
        return keys, counts, inverse
    every_key, every_count = holders.gather(keys), holders.gather(counts)
    keys, inverse = holders.together(partial(torch.unique, every_key, return_inverse=True))
    return keys, holders.together(lambda: _added_up(keys, inverse, every_count)), inverse


def _added_up(keys: torch.Tensor, inverse: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The sum of the `weight` of each of `keys`; `inverse`: positions in them."""
    return torch.zeros_like(keys).index_add_(0, inverse, weight)


def _is_local(ids: ChunkIds, wanted: torch.Tensor) -> torch.Tensor:
    """Which of `wanted` this rank holds, bool."""
    return (wanted >= ids.local.start) & (wanted < ids.local.stop)


def _first_ids(ids: ChunkIds) -> tuple[torch.Tensor, torch.Tensor]:
    """Pair and weight of those of the first ids that are here, where the sample is empty."""
    first = ids.range(0, min(ids.num_ids, ids.num_rows))
    keys = ids.keys(first[_is_local(ids, first)])
    return keys, torch.ones_like(keys)


def _drawn(ids: ChunkIds, sample: HashFunction, count: int) -> torch.Tensor:
    """Pairs of the ids drawn by `sample`, 0 for those of other ranks."""
    drawn = ids.drawn(sample, count)
    if len(ids.local) == ids.num_ids:
        return ids.keys(drawn)  # a mask would wait for a GPU
    here, pairs = _is_local(ids, drawn), torch.zeros_like(drawn)
    pairs[here] = ids.keys(drawn[here])
    return pairs


def taken_at(table: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """`table[keys]` as int64, without another copy of its size."""
    out = torch.empty_like(keys)
    for first in range(0, len(keys), _KEY_BLOCK):
        at = slice(first, first + _KEY_BLOCK)
        out[at] = table[keys[at]]
    return out


def _rows_of(keys: torch.Tensor, state: ChunkState) -> tuple[torch.Tensor, torch.Tensor]:
    """`rows_of_keys` as int32, without another copy of its size."""
    a = torch.empty_like(keys, dtype=torch.int32)
    b, shape = torch.empty_like(a), state.shape
    for first in range(0, len(keys), _KEY_BLOCK):
        at = slice(first, first + _KEY_BLOCK)
        a[at], b[at] = rows_of_keys(keys[at], shape.helper_rows, shape.levels)
    return a, b


def points_over(
    state: ChunkState,
    *,
    a: torch.Tensor,
    b: torch.Tensor,
    weights: torch.Tensor,
    starts: torch.Tensor,
) -> PairPoints:
    """Points main[a] + helper[b] of a chunk, shrunk where its ids are counted.

    An id of level l is the point w x + (1 - w) m, with w its share (`counts.shrinkage`) and m the
    mean of what helper rows hold: a point of main rows w M and helper rows w H + (1 - w) m. So it
    is a sum of two rows as without shrinkage, and is scored as such. There are main rows
    [k, levels] and helper rows [levels, k'], made level by level, as all of them in double
    precision would be most of what a clustering takes.
    """
    num_rows, weight = state.codes.config.num_rows, state.weight.detach()
    main, helper = weight[:num_rows], weight[num_rows:]
    if state.levels == 1:
        return PairPoints(main, helper, a=a, b=b, weights=weights, starts=starts)
    check_finite(main, helper)
    # In double precision, as points are rounded to fixed point afterwards.
    main, helper, shares = main.double(), helper.double(), shrinkage(weight.device)
    # By rows and not by ids, of which each rank of a ROW_WISE table has some.
    mean = helper.mean(0) + main.mean(0)

    def books(level: int) -> tuple[torch.Tensor, torch.Tensor]:
        return main * shares[level], shares[level] * helper + (1 - shares[level]) * mean

    tops = [book.abs().amax() for level in range(state.levels) for book in books(level)]
    scale = scale_of(float(torch.stack(tops).amax()))
    leveled = main.new_empty((num_rows, state.levels, main.shape[1]), dtype=torch.int32)
    own = main.new_empty((state.levels, *helper.shape), dtype=torch.int32)
    for level in range(state.levels):
        leveled[:, level], own[level] = ((book * scale).round() for book in books(level))
    leveled, own = leveled.flatten(0, 1), own.flatten(0, 1)
    return PairPoints.from_integers(leveled, own, scale, a, b, weights, starts)


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
    # Integers, so that it makes no difference how many ranks added them up.
    starts = starting_pairs(drawn, starts_wanted(state, weights), keys)
    if weights is not None:  # a centroid where nothing weighs would lose its cluster at once
        starts = starts[counts[starts] > 0]
    a, b = _rows_of(keys, state)
    return points_over(state, a=a, b=b, weights=counts, starts=starts)


def list_ids(
    ids: ChunkIds, sample: HashFunction, most: int | None, weights: IdWeights | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pair and weight of every id that is here, or of the sampled ones; int64 each.

    Sampled are about `most` of all ids of the table.
    """
    share = 1.0 if most is None else min(1.0, most / ids.num_ids)
    if ids.on_gpu and share < 1.0:
        return _sample_on_gpu(ids, sample, share, weights)
    if ids.on_gpu:
        every = ids.gpu_range(ids.local.start, ids.local.stop).keys()
        if weights is None:
            return every, every.new_ones(()).expand(len(every))
        return every, weights.of(ids.local.start, ids.local.stop)
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
    room, found = sample_room(len(ids.local), share), 0
    while True:
        keys = torch.empty(room, dtype=torch.int64, device=ids.codes.device)
        sums = None if weights is None else torch.empty_like(keys)
        count = torch.zeros(1, dtype=torch.int64, device=ids.codes.device)
        for first, last in ids.blocks(len(ids.local) if weights is None else GPU_ID_BLOCK):
            weight = None if weights is None else weights.of(first, last)
            part = ids.gpu_range(first, last)
            part.sampled(sample, round(share * 2**31), weight, keys, sums, count)
        found = int(count)
        if found <= room:
            listed = keys[:found]
            return listed, listed.new_ones(()).expand(found) if sums is None else sums[:found]
        room = found
