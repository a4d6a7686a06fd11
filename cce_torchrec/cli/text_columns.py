"""Columns of text, as commands print them."""

from __future__ import annotations

from collections.abc import Sequence


def columns(head: Sequence[str], body: Sequence[Sequence[str]], *, left: int) -> list[str]:
    """Lines of a table: the first `left` columns begin at their left, numbers end at the right."""
    # As wide as the widest cell.
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    out = []
    for row in (head, *body):
        cells = [
            text.ljust(width) if place < left else text.rjust(width)
            for place, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        out.append("  ".join(cells).rstrip())
    return out
