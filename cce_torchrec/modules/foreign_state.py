"""State dicts that are not of the tables that they are loaded into.

torch names missing keys and shapes that differ, after it has copied what it could; it cannot know
that the keys of a compressed table belong together.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from cce_torchrec.config import CCEEmbeddingBagConfig, is_cce
from cce_torchrec.modules.old_names import new_name
from cce_torchrec.table import codes_key, physical_table

logger = logging.getLogger(__name__)


def refuse_foreign_state(
    configs: Iterable[EmbeddingBagConfig], state: Mapping[str, Any], prefix: str
) -> None:
    """Looks at what is about to be loaded into compressed tables, before anything is written.

    Codes without codebooks, or some of these alone, are told of in the log: whether they are an
    error is for torch to say, by `strict`, of which its hooks do not know.

    Args:
        configs: the tables of a collection.
        state: what is about to be loaded.
        prefix: of the collection's keys in it.

    Raises:
        ValueError: codebooks or codes of other shapes, naming the table and both; or codes for a
            table that has none.
    """
    for config in configs:
        if is_cce(config):
            expected = _expected(config, prefix)
            _refuse_shapes(config, state, expected)
            _tell_of_halves(config, state, expected)


def _expected(config: CCEEmbeddingBagConfig, prefix: str) -> dict[str, list[int]]:
    """Names and shapes of a table's codebooks and codes; `[]` of codes that it does not have."""
    shape = [config.rows_per_chunk, config.chunk_dim]
    chunks = [physical_table(config.name, chunk) for chunk in range(config.num_chunks)]
    packing = config.packing
    codes = packing.shape(config.num_embeddings, config.num_chunks) if packing.bits else []
    return {
        **{new_name(prefix, chunk): shape for chunk in chunks},
        codes_key(prefix, config.name): codes,
    }


def _refuse_shapes(
    config: CCEEmbeddingBagConfig, state: Mapping[str, Any], expected: Mapping[str, list[int]]
) -> None:
    for name, shape in expected.items():
        if name not in state:
            continue
        # Of a ShardedTensor or DTensor it is the size of the whole, on every rank.
        found = list(state[name].size()) if isinstance(state[name], torch.Tensor) else []
        if found == shape:
            continue
        if not shape:
            raise ValueError(
                f"table {config.name!r}: the checkpoint has codes, the model has no learned codes "
                "for it; configure the table as it was saved"
            )
        raise ValueError(
            f"table {config.name!r}: the checkpoint has {found} in {name!r}, the model {shape} "
            f"(num_embeddings={config.num_embeddings}, num_rows={config.num_rows}, "
            f"num_helper_rows={config.helper_rows}, num_chunks={config.num_chunks}); configure the "
            "table as it was saved"
        )


def _tell_of_halves(
    config: CCEEmbeddingBagConfig, state: Mapping[str, Any], expected: Mapping[str, list[int]]
) -> None:
    wanted = [name for name, shape in expected.items() if shape]
    missing = [name for name in wanted if name not in state]
    # Not an error, as parameters and buffers may come in two calls.
    if missing and len(missing) < len(wanted):
        logger.warning(
            "table %r: the state dict has %r and not %r; codes belong to the codebooks that they "
            "were learned with, and the table is wrong until both are loaded",
            config.name,
            next(name for name in wanted if name in state),
            missing[0],
        )
