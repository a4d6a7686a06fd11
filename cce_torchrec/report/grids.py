"""Tables of text in HTML."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from cce_torchrec.report.html import Html, tag


def grid(
    head: Sequence[str],
    body: Sequence[Sequence[Any]],
    *,
    left: int,
    highlighted: Collection[int] = (),
    class_: str = "",
) -> Html:
    """A table that scrolls sideways where it is too wide.

    Args:
        head: names of the columns.
        body: rows of text or HTML.
        left: columns that begin at their left; those of numbers end at the right.
        highlighted: rows that differ in what matters.
        class_: of the table.
    """

    def row(name: str, cells: Sequence[Any], **attributes: Any) -> Html:
        return tag(
            "tr",
            [
                # The first cell names its row, which a reader's voice says with the others.
                tag(
                    "th" if name == "th" or not place else "td",
                    cell,
                    class_="" if place < left else "number",
                    scope="col" if name == "th" else None if place else "row",
                )
                for place, cell in enumerate(cells)
            ],
            **attributes,
        )

    rows = [
        row("td", cells, class_="differs" if place in highlighted else None)
        for place, cells in enumerate(body)
    ]
    table = tag("table", tag("thead", row("th", head)), tag("tbody", rows), class_=class_ or None)
    # Focusable, as only then a keyboard scrolls it.
    return tag("div", table, class_="scroll", tabindex="0", role="region", aria_label="table")
