"""What of a table's health a reader should look at, in plain words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

DEAD = 0.1
"""Share of rows that no id reads, from which on it is said."""
UNEVEN = 4.0
"""Imbalance of codes from which on it is said: a hash has about 1."""
UNTOUCHED = 0.5
"""Share of a plain table's rows that were never trained, from which on it is said."""
_WORDS = (
    (0.13, "a tenth"), (0.17, "a sixth"), (0.22, "a fifth"), (0.29, "a quarter"),
    (0.38, "a third"), (0.45, "four tenths"), (0.55, "half"), (0.63, "six tenths"),
    (0.7, "two thirds"), (0.78, "three quarters"), (0.86, "four fifths"), (0.97, "nine tenths"),
)  # fmt: skip


def share_in_words(share: float) -> str:
    """About how much a share of 0.1 or more is, as it is said."""
    if share >= 1:
        return "all"
    # Words, as nobody acts on a tenth of a percent.
    return next((word for below, word in _WORDS if share < below), "nearly all")


def warnings_of(table: dict[str, Any]) -> list[str]:
    """Sentences about what is wrong with a table, given its health (health.py: TABLE)."""
    if table["kind"] == "plain":
        return _of_plain(table)
    chunks = table["chunks"]
    out = _grouped(chunks, lambda chunk: _dead(chunk["empty_codes"], table["num_rows"], "main"))
    out += _grouped(
        chunks, lambda chunk: _dead(chunk["dead_helper_rows"], table["num_helper_rows"], "helper")
    )
    out += _grouped(chunks, _uneven)
    out += _grouped(chunks, _not_finite)
    # Before, main rows of the recipe "rare" are zero by intention.
    if table["clusterings"]:
        out += _grouped(chunks, _zero_main)
    return out


def _grouped(
    chunks: list[dict[str, Any]], say: Callable[[dict[str, Any]], tuple[str, str] | None]
) -> list[str]:
    """What is said of chunks, once for all of which it is the same: before and after their name."""
    said: dict[tuple[str, str], list[int]] = {}
    for chunk in chunks:
        found = say(chunk)
        if found is not None:
            said.setdefault(found, []).append(chunk["chunk"])
    return [f"{before} {_names(own)} {after}" for (before, after), own in said.items()]


def _names(chunks: list[int]) -> str:
    if len(chunks) == 1:
        return f"chunk {chunks[0]}"
    return f"chunks {', '.join(map(str, chunks[:-1]))} and {chunks[-1]}"


def _dead(dead: int, rows: int, kind: str) -> tuple[str, str] | None:
    if not rows or dead / rows < DEAD:
        return None
    return f"{share_in_words(dead / rows)} of the {kind} rows of", "have no id"


def _uneven(chunk: dict[str, Any]) -> tuple[str, str] | None:
    if (chunk["imbalance"] or 0) < UNEVEN:
        return None
    return "the ids of", (
        f"are spread unevenly over the codes (imbalance over {UNEVEN:g}, where 1 is even)"
    )


def _not_finite(chunk: dict[str, Any]) -> tuple[str, str] | None:
    rows = chunk["main"]
    if rows is None or not rows["not_finite"]:
        return None
    return "rows of", "have values that are NaN or infinite"


def _zero_main(chunk: dict[str, Any]) -> tuple[str, str] | None:
    rows = chunk["main"]
    if rows is None or rows["zero"] < rows["looked_at"]:
        return None
    return "all main rows of", "are zero, after a clustering"


def _of_plain(table: dict[str, Any]) -> list[str]:
    out = []
    rows, untouched = table["rows"], table["untouched"]
    if rows is not None and rows["not_finite"]:
        out.append(f"{rows['not_finite']:,} values are NaN or infinite")
    if rows is not None and rows["zero"] / max(1, rows["looked_at"]) >= DEAD:
        out.append(f"{share_in_words(rows['zero'] / rows['looked_at'])} of the rows are zero")
    if untouched is not None and untouched >= UNTOUCHED:
        whose = "no row was" if untouched == 1 else f"{share_in_words(untouched)} of the rows were"
        never = "ever" if untouched == 1 else "never"
        out.append(f"{whose} {never} trained: what the optimizer has added up of them is 0")
    return out
