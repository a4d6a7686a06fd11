"""Features with any number of ids a row, for methods that look up one id of each feature."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from cce_torchrec.data import Bags, Rows


def ids_of_feature(rows: Rows, number: int) -> torch.Tensor:
    """All ids of one feature, by its number: those of one id a row come first."""
    single = rows.ids.shape[1]
    return rows.ids[:, number] if number < single else rows.bags[number - single].values


def side_by_side(rows: Rows) -> torch.Tensor:
    """Ids [R, F] of all features, R being the most that one of them has in `rows`.

    What a feature has less is filled with its own ids again, whose vectors `pooled` leaves out. So
    a method that learns from the ids of a batch, and not from how often they are there, sees none
    that is not in the batch.
    """
    if not rows.bags:
        return rows.ids
    columns = [ids_of_feature(rows, i) for i in range(rows.ids.shape[1] + len(rows.bags))]
    return torch.stack([_repeated(own, max(map(len, columns))) for own in columns], dim=1)


def _repeated(ids: torch.Tensor, count: int) -> torch.Tensor:
    if not len(ids):
        return ids.new_zeros(count)
    return ids.repeat(-(-count // len(ids)))[:count]


def pooled(embeddings: torch.Tensor, rows: Rows, order: Sequence[int]) -> torch.Tensor:
    """Embeddings [B, F, D] of rows, the sums of bags, from those [R, F, D] of `side_by_side`.

    Args:
        order: numbers of the features of the columns of `embeddings`.
    """
    if not rows.bags:
        return embeddings
    single, out = rows.ids.shape[1], []
    for own, number in zip(embeddings.unbind(1), order, strict=True):
        if number < single:
            out.append(own[: len(rows)])
            continue
        bag = rows.bags[number - single]
        row = torch.arange(len(rows)).repeat_interleave(bag.lengths)
        zeros = own.new_zeros(len(rows), own.shape[1])
        out.append(zeros.index_add(0, row, own[: len(bag.values)]))
    return torch.stack(out, dim=1)


def in_batches(rows: Rows, size: int) -> Iterator[Rows]:
    """`rows` in their order, `size` at a time; the last ones may be fewer."""
    parts = zip(rows.dense.split(size), rows.ids.split(size), rows.labels.split(size), strict=True)
    bags = [_cut(bag, size) for bag in rows.bags]
    for dense, ids, labels in parts:
        yield Rows(dense, ids, labels, tuple(next(bag) for bag in bags))


def _cut(bags: Bags, size: int) -> Iterator[Bags]:
    lengths = bags.lengths.split(size)
    values = bags.values.split([int(own.sum()) for own in lengths])
    return (Bags(*pair) for pair in zip(values, lengths, strict=True))
