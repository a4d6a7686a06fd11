"""Names that TorchRec's own collections give to the tables that stay plain in one of ours.

A state dict of a model from before its collections were replaced loads into those tables by it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torchrec.modules.embedding_configs import EmbeddingBagConfig

from cce_torchrec.config import is_cce

_INNER = "embedding_bag_collection.embedding_bags."
"""Of the names in a collection of ours."""
_SEQUENCES = "bags."
"""Ends the prefix of the collection inside one of sequences."""


def old_names(prefix: str, table: str) -> list[str]:
    """What `EmbeddingBagCollection` and `EmbeddingCollection` call a table's weight.

    Args:
        prefix: of the names of the collection of ours.
        table: a plain one.
    """
    outer = prefix.removesuffix(_SEQUENCES)
    # Of sequences first: a collection that a user has called so keeps its name.
    found = [f"{outer}embeddings.{table}.weight"] if outer != prefix else []
    return [*found, f"{prefix}embedding_bags.{table}.weight"]


def new_name(prefix: str, table: str) -> str:
    """What a collection of ours calls the weight of a plain table."""
    return f"{prefix}{_INNER}{table}.weight"


def take_old_names(
    configs: Iterable[EmbeddingBagConfig], state: dict[str, Any], prefix: str
) -> None:
    """Renames in `state`, which is about to be loaded, what has the name of TorchRec's collections.

    Raises:
        ValueError: two names of `state` claim one table.
    """
    for config in configs:
        if is_cce(config):
            continue
        own = new_name(prefix, config.name)
        found = [name for name in (own, *old_names(prefix, config.name)) if name in state]
        if len(found) > 1:
            raise ValueError(
                f"table {config.name!r}: the state dict has both {found[0]!r} and {found[1]!r}, "
                "and both are its weight; take one of them out"
            )
        if found and found[0] != own:
            state[own] = state.pop(found[0])
