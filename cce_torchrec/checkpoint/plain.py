"""Values that JSON gives back as they were."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any


def plain(key: str, value: Any) -> Any:
    """A copy of `value`, the extra state `key` of a module, if JSON gives it back as it is.

    Raises:
        ValueError: it would be something else after a load.
    """
    found, same = None, False
    try:
        # A copy, as the module goes on to change its own while another thread writes.
        found = json.loads(json.dumps(value))
        same = found == value
    except (TypeError, ValueError):
        pass  # JSON cannot hold it at all
    if not same:
        raise ValueError(
            f"{key}: a checkpoint holds tensors and plain values (numbers, text, lists and "
            f"dictionaries by text), and no {type(value).__name__} {value!r:.60}; let the module's "
            "get_extra_state return plain values"
        )
    return found


def plain_extra(extra: Any) -> Any:
    """A copy of the `extra` of a `save_checkpoint`; tuples come back as lists.

    Raises:
        ValueError: JSON does not hold it.
    """
    for key in _keys(extra):
        # JSON would make text of it, and `milestones[30]` of a scheduler would not be found again.
        if not isinstance(key, str):
            raise ValueError(
                f"extra has the key {key!r} ({type(key).__name__}), and JSON has text alone; use "
                f"{str(key)!r}, or a list of pairs"
            )
    try:
        return json.loads(json.dumps(extra))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"extra is kept as JSON ({error}); give numbers, text, lists and dictionaries by text"
        ) from error


def _keys(value: Any) -> Iterator[Any]:
    """The keys of all dictionaries in `value`."""
    if isinstance(value, dict):
        yield from value
        value = list(value.values())
    for inner in value if isinstance(value, list | tuple) else ():
        yield from _keys(inner)
