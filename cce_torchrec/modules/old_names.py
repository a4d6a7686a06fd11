"""Names that TorchRec's own collections give to the tables that stay plain in one of ours.

A state dict of a model from before its collections were replaced loads into those tables by it,
and the log names the tables that are compressed since.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from torchrec.modules.embedding_configs import EmbeddingBagConfig

from cce_torchrec.codes.old_codes import take_old_codes
from cce_torchrec.config import CCEEmbeddingBagConfig, is_cce
from cce_torchrec.table import codes_key

logger = logging.getLogger(__name__)

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

    Codes of the form that checkpoints had before format 4 are packed.

    Raises:
        ValueError: two names of `state` claim one table.
    """
    for config in configs:
        if is_cce(config):
            _tell_of_full_weight(config, state, prefix)
            shape = config.num_embeddings, config.num_chunks
            take_old_codes(config, state, codes_key(prefix, config.name), *shape)
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


def _tell_of_full_weight(
    config: CCEEmbeddingBagConfig, state: Mapping[str, Any], prefix: str
) -> None:
    for name in old_names(prefix, config.name):
        if name in state:
            # No error: a state dict of before is what a job starts from when it adopts CCE.
            logger.warning(
                "table %r: the state dict has its full weight (%r), which a compressed table "
                "(num_rows=%d, num_chunks=%d) does not take; load_state_dict(strict=False) loads "
                "the rest, and the table stays as it is",
                config.name,
                name,
                config.num_rows,
                config.num_chunks,
            )
