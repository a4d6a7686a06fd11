"""From a budget for all compressed tables to the share of each, by one rule for every method."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

FLOAT_BYTES = 4


class DoesNotFit(ValueError):
    """A budget is too small for a method; the message says what it needs."""


@dataclass(frozen=True)
class Share:
    """What one table may take: bytes of everything stored, or trained values."""

    amount: int
    counts_bytes: bool
    """Whether codes and indices count; otherwise only trained values do."""

    def values(self, stored_bytes: int = 0) -> int:
        """Trained values (float32) that fit beside `stored_bytes` of codes, which are paid first.

        0 if not even the codes fit.
        """
        if not self.counts_bytes:
            return self.amount
        return max(0, self.amount - stored_bytes) // FLOAT_BYTES

    def rows(self, width: int, stored_bytes: int = 0, at_least: int = 1) -> int:
        """Rows of `width` values that fit beside `stored_bytes` of codes.

        Raises:
            DoesNotFit: they are fewer than `at_least`.
        """
        rows = self.values(stored_bytes) // width
        if rows < at_least:
            unit = "bytes" if self.counts_bytes else "parameters"
            needed = at_least * width * (FLOAT_BYTES if self.counts_bytes else 1)
            needed += stored_bytes if self.counts_bytes else 0
            raise DoesNotFit(f"a table has {self.amount:,} {unit} and needs {needed:,}")
        return rows


@dataclass(frozen=True)
class Budget:
    """What all compressed tables may take together.

    "none" (full tables), "bytes=880000" (in all), "share=0.05" (of the full tables' parameters), or
    "ppd=64" (parameters a dimension of each table).
    """

    kind: str
    amount: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Budget:
        """The budget that `str` made `text` of.

        Raises:
            ValueError: with the forms that there are.
        """
        kind, _, amount = text.partition("=")
        try:
            parsed = cls(kind, float(amount or 0))
        except ValueError:
            parsed = cls("")
        known = parsed.kind in ("bytes", "share", "ppd") and 0 < parsed.amount < math.inf
        if not known and text != "none":
            raise ValueError(
                f"budget {text!r} has none of the forms bytes=880000, share=0.05, ppd=64"
            )
        return parsed

    def __str__(self) -> str:
        return self.kind if self.kind == "none" else f"{self.kind}={self.amount:.10g}"

    def shares(self, sizes: Sequence[int], dim: int) -> list[Share]:
        """The share of each table of `sizes` ids: in proportion to the full tables' rows."""
        if self.kind == "none":
            return [Share(FLOAT_BYTES * size * dim, True) for size in sizes]
        if self.kind == "ppd":
            return [Share(int(self.amount) * dim, False) for _ in sizes]
        if self.kind == "share":
            return [Share(int(self.amount * size * dim), False) for size in sizes]
        ids = sum(sizes)
        return [Share(int(self.amount * size / ids), True) for size in sizes]
