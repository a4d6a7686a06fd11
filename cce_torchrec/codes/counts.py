"""How often ids were trained, in four bits an id: approximate counts (Morris, CACM 1978).

A level l stands for about (1.5^l - 1) / 0.5 batches. It rises by one with the probability 1.5^-l,
once a batch however often the id is in it, by a hash of the id and of the number of the batch. So
counts are the same on one rank and on many, on a CPU and on a GPU, and in a job that was resumed.
Up to 870 batches they are right to half of their value, which is all that shrinkage asks.
"""

from __future__ import annotations

import torch

from cce_torchrec.codes.storage import in_whole_words

LEVELS = 16
BASE = 1.5
PRIOR = 20
"""Training batches that the mean of all ids weighs beside those of an id itself."""
_PER_BYTE = 2


def counts_bytes(ids: int) -> int:
    """Bytes of the counts of so many ids, with one that belongs to none."""
    return ids // _PER_BYTE + 2


def no_counts(ids: int, device: torch.device) -> torch.Tensor:
    """Counts of so many ids, all 0: uint8, two ids a byte."""
    return in_whole_words(torch.zeros(counts_bytes(ids), dtype=torch.uint8, device=device))


def level_counts(device: torch.device | None = None) -> torch.Tensor:
    """What each level stands for, float64 [LEVELS]."""
    levels = torch.arange(LEVELS, dtype=torch.float64, device=device)
    return (BASE**levels - 1) / (BASE - 1)


def shrinkage(device: torch.device | None = None) -> torch.Tensor:
    """Share of an id's own vector by its level, n / (n + PRIOR), float64 [LEVELS]."""
    counts = level_counts(device)
    return counts / (counts + PRIOR)


def chances() -> list[int]:
    """Of 2^31 hashes of a batch, how many have an id of each level rise; the last level stays."""
    return [round(BASE**-level * (1 << 31)) for level in range(LEVELS - 1)] + [0]


def levels_of(counts: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Levels of `ids`, counted from the first id of `counts`, int64."""
    return (counts[ids >> 1].long() >> ((ids & 1) * 4)) & 15


def count(counts: torch.Tensor, ids: torch.Tensor, bits: torch.Tensor) -> None:
    """Counts a batch for its `ids`.

    Args:
        counts: of a part of a table's ids; written.
        ids: int64, counted from the first id of the part, with repetitions.
        bits: of each, by `hashing.bits_of_batch`.
    """
    spare = counts.numel() - 1
    levels = levels_of(counts, ids)
    rises = bits < torch.tensor(chances(), device=ids.device)[levels]
    # Repetitions of an id write the same byte; of two ids that share one, each has a pass. The
    # last byte takes what belongs to the other pass: to select ids would wait for the device.
    for half in range(_PER_BYTE):
        at = torch.where(rises & (ids & 1 == half), ids >> 1, spare)
        counts[at] = counts[at] + (1 << 4 * half)
    counts[spare] = 0  # so that counts are the same bytes on every rank and device


def together(copies: list[torch.Tensor]) -> torch.Tensor:
    """Counts of ids whose batches were counted by several ranks, each its own part of them.

    What all had in common, as the least says, counts once: it is what they were given before.
    """
    stands_for = level_counts(copies[0].device)
    out = torch.zeros_like(copies[0])
    for half in (0, 4):
        counts = torch.stack([stands_for[(copy.long() >> half) & 15] for copy in copies])
        total = counts.sum(0) - (len(copies) - 1) * counts.amin(0)
        # The nearest level, as a lower one would lose what was counted at each merge.
        middles = (stands_for[1:] + stands_for[:-1]) / 2
        out |= (torch.bucketize(total, middles).to(torch.uint8)) << half
    return out
