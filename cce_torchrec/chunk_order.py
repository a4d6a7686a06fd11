"""With which chunk the embeddings of a feature begin, where several features share codebooks.

Ids of two features that read the same row of a chunk would have it in the same columns of their
embeddings. Where each feature begins with another chunk they have it in different ones, so that a
network can tell the two apart better; it takes no bytes and no time (docs/settings.md, "Joint
tables").
"""

from __future__ import annotations

from collections.abc import Iterable

import torch


def first_chunk(starts: Iterable[int], start: int, num_chunks: int) -> int:
    """The chunk that ids of the range from `start` on begin with.

    Args:
        starts: first ids of all ranges of the table; features of one range share its embeddings.
        num_chunks: of the table.
    """
    return sorted(set(starts)).index(start) % num_chunks


def chunks_in_order(first: torch.Tensor, num_chunks: int) -> torch.Tensor:
    """The chunk at each place of embeddings that begin with chunks `first` [n]: [n, c]."""
    places = torch.arange(num_chunks, device=first.device)
    return (first.unsqueeze(1) + places) % num_chunks


def first_chunks(starts: Iterable[int], ids: torch.Tensor, num_chunks: int) -> torch.Tensor:
    """`first_chunk` of each of the table's `ids` [n], int64 [n].

    Ids between two ranges, which no feature reads, count to the one before them.
    """
    rising = torch.tensor(sorted(set(starts)), dtype=torch.int64)
    at = torch.bucketize(ids.long(), rising.to(ids.device), right=True) - 1
    return at.clamp(min=0) % num_chunks


def rotated(vectors: torch.Tensor, first: torch.Tensor, num_chunks: int) -> torch.Tensor:
    """Embeddings [n, D] of `vectors` [n, D] whose chunks are in their own order, 0 to c - 1."""
    parts = vectors.view(len(vectors), num_chunks, -1)
    order = chunks_in_order(first, num_chunks).unsqueeze(2).expand_as(parts)
    return parts.gather(1, order).view_as(vectors)


def unrotated(embeddings: torch.Tensor, first: torch.Tensor, num_chunks: int) -> torch.Tensor:
    """The inverse of `rotated`: [n, D], chunk after chunk, of embeddings [n, D]."""
    return rotated(embeddings, -first, num_chunks)
