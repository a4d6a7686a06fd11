"""Blocks of rows as they come from files, made into blocks of the lengths that are wanted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from cce_torchrec.data.dataset import Bags, Rows


def joined(blocks: Sequence[Rows]) -> Rows:
    """All rows of several blocks."""
    bags = (
        Bags(torch.cat([b.values for b in same]), torch.cat([b.lengths for b in same]))
        for same in zip(*(block.bags for block in blocks), strict=True)
    )
    return Rows(
        torch.cat([block.dense for block in blocks]),
        torch.cat([block.ids for block in blocks]),
        torch.cat([block.labels for block in blocks]),
        tuple(bags),
    )


def regrouped(blocks: Iterator[Rows], lengths: Iterable[int]) -> Iterator[Rows]:
    """The rows of `blocks` again, in blocks of these `lengths`.

    Raises:
        ValueError: there are fewer rows.
    """
    held: list[Rows] = []
    for length in lengths:
        while not held or sum(map(len, held)) < length:
            block = next(blocks, None)
            if block is None:
                raise ValueError("a file has fewer rows than it had when they were counted")
            held.append(block)
        last = held[-1]
        more = sum(map(len, held)) - length
        held[-1] = last.take(torch.arange(len(last) - more))
        made = joined(held)
        # Not the blocks themselves: they would stay in memory for as long as what is made of them.
        held = [last.take(torch.arange(len(last) - more, len(last)))]
        yield made


def ahead(blocks: Iterator[Rows]) -> Iterator[Rows]:
    """The same blocks, the next of which is read by a thread while one is trained on."""
    # Arrow and torch let other threads run while they work.
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(next, blocks, None)
        while (block := coming.result()) is not None:
            coming = reader.submit(next, blocks, None)
            yield block
