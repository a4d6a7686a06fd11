"""HTML that is put together from parts, of which text is escaped."""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import Any

_VOID = {"meta", "line", "rect", "circle", "path", "polyline", "br", "hr"}
"""Elements without content: those of HTML, and of SVG those that have none here."""


class Html(str):
    """Text that is HTML already; all other text is escaped where it is put in."""


def tag(name: str, *children: Any, **attributes: Any) -> Html:
    """An element.

    Args:
        name: of the element.
        children: `Html` as it is, other text escaped, lists of both, None for nothing.
        attributes: their values are escaped; `class_` is `class`, other underscores are dashes;
            those that are None or False are left out.
    """
    # Names are of this package; values may be of anyone's files.
    told = "".join(
        f" {_attribute(key)}" + ("" if value is True else f'="{html.escape(str(value))}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    if name in _VOID and not children:
        return Html(f"<{name}{told}>" if name in ("meta", "br", "hr") else f"<{name}{told}/>")
    return Html(f"<{name}{told}>{joined(children)}</{name}>")


def joined(children: Iterable[Any]) -> Html:
    """Parts one after the other, of which text is escaped."""
    out = []
    for child in children:
        if child is None:
            continue
        if isinstance(child, Html):
            out.append(child)
        elif isinstance(child, list | tuple):
            out.append(joined(child))
        else:
            out.append(Html(html.escape(str(child))))
    return Html("".join(out))


def _attribute(name: str) -> str:
    return name.rstrip("_").replace("_", "-")
