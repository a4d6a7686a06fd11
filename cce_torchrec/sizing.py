"""From a budget to chunks, and to rows of main and helper."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cce_torchrec.packing import CodePacking
from cce_torchrec.recipe import trains_rare

DEFAULT_HELPER_RATIO = 3
MAX_ROWS = 2**31 - 1
BYTES_CHUNKS, PARAMS_CHUNKS = 4, 8
"""At most, where the bytes of codes count, and where they do not or there are none."""
RARE_ROWS = (16, 4, 2)
"""Main rows of rare ids, where parameters are counted; codes are not worth their bytes there."""
_CODE_ROWS = tuple(2**bits for bits in (28, 24, 20, 16, 14, 12, 10, 8, 6, 4, 3, 2, 1))
"""Main rows that get the most out of their codes."""
_CODE_SHARES = ((17, 1 / 2), (1, 3 / 2))
"""Of so many main rows or more what codes get for each byte of codebooks."""


def default_chunks(fields: Mapping[str, Any], *, count_codes: bool) -> int:
    """The chunks of a table of a budget, of such `fields`: as many as its width allows, up to most.

    Those are 4 where the bytes of codes count, and 8 where they do not or where there are none: a
    hash alone, and rare ids. Where none but a single chunk has a width that FBGEMM reads, and the
    embedding is wider, it is most, which is refused then.
    """
    codes = count_codes and fields.get("learned_codes", True) and not trains_rare(fields)
    most = BYTES_CHUNKS if codes else PARAMS_CHUNKS
    dim = fields.get("embedding_dim", 0)
    if not isinstance(dim, numbers.Integral) or dim == 4:
        return 1 if dim == 4 else most  # what is no number is refused with all other fields
    return next((c for c in range(most, 1, -1) if dim % (4 * c) == 0), most)


@dataclass(frozen=True, kw_only=True)
class Sizing:
    """What the rows of a table follow from."""

    num_ids: int
    num_chunks: int
    row_bytes: int
    """Of a row in every chunk."""
    recipe: str
    """rare or frequent."""
    learned_codes: bool
    helper_ratio: float | None
    """Helper rows of a main row; None: 3, or what is best."""
    finalized: bool = False
    """Whether codes are to tell all rows apart, where main has its part of them."""

    def main_rows(self, total: int, count_codes: bool) -> int:
        """Of `total` rows of a chunk; with `count_codes` as many as their codes are worth."""
        for main in self._choices(total, count_codes):
            if not count_codes or self._worth(main, total):
                return main
        return 1

    def within(self, budget: int) -> tuple[int, int]:
        """Main rows, and those of main and helper, whose bytes with codes are at most `budget`."""
        if self._in_ratio(count_codes=True):
            # By bisection, as the bytes of codes rise in steps with the rows.
            low, high = 0, min(MAX_ROWS, budget // self.row_bytes)
            while low < high:
                middle = (low + high + 1) // 2
                coded = middle if self.finalized else self.main_rows(middle, True)
                codes = self._code_bytes(coded)
                fits = middle * self.row_bytes + codes <= budget
                low, high = (middle, high) if fits else (low, middle - 1)
            return self.main_rows(low, True), low
        # From the most rows down: codes that are not worth their bytes leave more helper rows.
        for main in (*(() if self.recipe == "rare" else _CODE_ROWS), 1):
            total = min(MAX_ROWS, (budget - self._code_bytes(main)) // self.row_bytes)
            if main == 1 or (main in self._choices(total, True) and self._worth(main, total)):
                break
        return main, total

    def _in_ratio(self, count_codes: bool) -> bool:
        """Whether main has its part of all rows, whatever codes take."""
        by_ratio = self.helper_ratio is not None or not count_codes or not self.learned_codes
        return by_ratio and self.recipe != "rare"

    def _choices(self, total: int, count_codes: bool) -> Sequence[int]:
        if self.recipe == "rare":
            return [] if count_codes else [main for main in RARE_ROWS if 2 * main <= total]
        ratio = DEFAULT_HELPER_RATIO if self.helper_ratio is None else self.helper_ratio
        part = max(1, min(total - 1, round(total / (1 + ratio))))
        if self._in_ratio(count_codes):
            return [part]
        return [main for main in _CODE_ROWS if main <= part]

    def _worth(self, main: int, total: int) -> bool:
        if self._in_ratio(count_codes=True):
            return True
        share = next(own for least, own in _CODE_SHARES if main >= least)
        return self._code_bytes(main) <= share * total * self.row_bytes

    def _code_bytes(self, main: int) -> int:
        rows = main if self.learned_codes else 1
        return CodePacking.of_rows(rows).nbytes(self.num_ids, self.num_chunks)
