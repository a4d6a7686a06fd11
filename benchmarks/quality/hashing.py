"""Rows of all ids under the package's own hash functions."""

from __future__ import annotations

import torch

from cce_torchrec.codes.hashing import CODE_ROLE, hash_function

FIRST_FREE_ROLE = 16
"""Hashes that the package has no use for get roles from here on."""


def hashed_rows(
    ids: torch.Tensor,
    num_rows: int,
    *,
    seed: int,
    table: str,
    chunk: int = 0,
    part: int = 0,
    drawn: int = 0,
) -> torch.Tensor:
    """Rows in [0, num_rows) of `ids`; part 0 drawn first is what CE's tables of the package have.

    Args:
        part: hashes of the same chunk that are independent.
        drawn: how often the hash was drawn anew.
    """
    role = CODE_ROLE if part == 0 else FIRST_FREE_ROLE + part
    return hash_function(seed, table, chunk, role=role, round_=drawn)(ids, num_rows)
