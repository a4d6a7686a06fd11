"""Notes of what a batch looks up in training, by the compiled kernel where it takes them."""

from __future__ import annotations

import torch

from cce_torchrec.codes.chunk_codes import ChunkCodes
from cce_torchrec.codes.hashing import hash_of_batch
from cce_torchrec.lookup import native


def note(codes: ChunkCodes, ids: torch.Tensor) -> None:
    """What `ChunkCodes.note` does.

    Args:
        codes: of the ids; written.
        ids: int64 [V], counted from the first one of `codes`.
    """
    counts, batches = codes.counts, codes.batches
    if native.is_traced(ids) or not codes.counting or not native.takes(ids):
        codes.note(ids)
        return
    codes.mark(ids)
    assert counts is not None and batches is not None
    config = codes.config
    hash_ = hash_of_batch(config.seed, config.name, int(batches))
    native.count_ids(counts, ids, codes.ids, hash_)
