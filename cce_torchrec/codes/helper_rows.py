"""The number of helper rows in a state dict, by which a load tells main from helper.

Codebooks have a table's main and helper rows in one tensor, so a finalized table has the shapes
that it had before, and so has any other division of the rows. Every rank saves and compares the
numbers of all tables, whatever chunks it holds, and before anything is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from cce_torchrec.config import CCEEmbeddingBagConfig, is_cce


def _keys(
    configs: Iterable[EmbeddingBagConfig], prefix: str
) -> Iterator[tuple[str, CCEEmbeddingBagConfig]]:
    for config in configs:
        if is_cce(config):
            yield f"{prefix}codes.{config.name}.num_helper_rows", config


def save_helper_rows(
    configs: Iterable[EmbeddingBagConfig], state: dict[str, Any], prefix: str
) -> None:
    """Adds the number of each CCE table to `state`, int64 []."""
    for key, config in _keys(configs, prefix):
        state[key] = torch.tensor(config.helper_rows, device="cpu")  # whatever the default is


def check_helper_rows(
    configs: Iterable[EmbeddingBagConfig], state: Mapping[str, Any], prefix: str
) -> None:
    """Compares the numbers in `state`, which is about to be loaded, with the tables.

    Raises:
        ValueError: a table whose rows are divided otherwise, naming it and both numbers.
    """
    for key, config in _keys(configs, prefix):
        found = state.get(key)
        if found is not None and not found.is_meta and int(found) != config.helper_rows:
            raise ValueError(
                f"table {config.name!r}: the checkpoint has {int(found)} helper rows, the model "
                f"{config.helper_rows}; configure num_rows and num_helper_rows as it was saved, "
                "and a table that was finalized as config.finalized()"
            )
