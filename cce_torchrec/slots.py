"""Names: logical slots (table, feature), and the physical tables and features behind them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Slot:
    """One feature of one table, as the user configured it."""

    table: str
    feature: str


def physical_table(table: str, chunk: int) -> str:
    """Name of the TorchRec table that holds one chunk of a CCE table."""
    return f"{table}#{chunk}"


def physical_feature(table: str, feature: str, chunk: int | None) -> str:
    """Feature name of one chunk (None: of a plain table); unambiguous, as tables have no '#'."""
    return f"{table}#{'' if chunk is None else chunk}.{feature}"
