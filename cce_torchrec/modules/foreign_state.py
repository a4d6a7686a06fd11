"""State dicts that are not of the tables that they are loaded into.

torch names missing keys and shapes that differ, after it has copied what it could; it cannot know
that the keys of a compressed table belong together.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torchrec.distributed.shards_wrapper import LocalShardsWrapper
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from cce_torchrec.codes.helper_rows import check_helper_rows
from cce_torchrec.config import CCEEmbeddingBagConfig, is_cce
from cce_torchrec.modules.old_names import new_name
from cce_torchrec.table import codes_key, logical_table, physical_table
from cce_torchrec.torchrec_internals import ShardedTensor

logger = logging.getLogger(__name__)


def refuse_foreign_state(
    configs: Iterable[EmbeddingBagConfig], state: Mapping[str, Any], prefix: str
) -> None:
    """Looks at what is about to be loaded into compressed tables, before anything is written.

    Codes without codebooks or the number of clusterings, or some of these alone, are told of in
    the log: whether they are an error is for torch to say, by `strict`, of which its hooks do not
    know.

    Args:
        configs: the tables of a collection.
        state: what is about to be loaded.
        prefix: of the collection's keys in it.

    Raises:
        ValueError: codebooks or codes of other shapes, or other main and helper rows, naming the
            table and both; codes for a table that has none; or DTensors, of plain tables as well.
    """
    _refuse_dtensors(state, prefix)
    compressed = [config for config in configs if is_cce(config)]
    for config in compressed:
        _refuse_several(config, state, prefix)
    # Before shapes, as codes have those that their table's rows give them.
    check_helper_rows(compressed, state, prefix)
    for config in compressed:
        expected = _expected(config, prefix)
        _refuse_shapes(config, state, expected)
        _tell_of_halves(config, state, expected)
        _tell_of_clusterings(config, state, prefix)


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


def refuse_shards(state: Mapping[str, Any], prefix: str) -> None:
    """Refuses what a sharded collection has saved, of which torch would copy the rest.

    Args:
        state: what is about to be loaded into an unsharded collection.
        prefix: of the collection's keys in it.

    Raises:
        ValueError: naming the table and the way from one to the other.
    """
    for name, value in _of_collection(state, prefix):
        if isinstance(value, ShardedTensor) or _has_shards(value):
            raise ValueError(
                f"table {_table_in(name)!r}: the state dict has shards of {list(value.size())} in "
                f"{name!r}, and the collection is not sharded; save the sharded model by "
                "save_checkpoint, and load that by load_checkpoint"
            )


def _refuse_dtensors(state: Mapping[str, Any], prefix: str) -> None:
    """Refuses what torch would copy in part: its hooks, and codes, take whole tensors or shards."""
    for name, value in _of_collection(state, prefix):
        if isinstance(value, DTensor) and not _has_shards(value):
            raise ValueError(
                f"table {_table_in(name)!r}: the state dict has a DTensor of {list(value.size())} "
                f"and placements {list(value.placements)} in {name!r}, and collections load whole "
                "tensors; give value.full_tensor(), which every rank has to call"
            )


def _of_collection(state: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """What of `state` is a collection's, of plain tables as well."""
    inside = tuple(prefix + own for own in ("codes.", "embedding_bag_collection."))
    return ((name, value) for name, value in state.items() if name.startswith(inside))


def _table_in(name: str) -> str:
    """The table that the key `name` of a state dict is of."""
    return logical_table(name.split(".")[-2])


def _has_shards(value: Any) -> bool:
    """Whether it is a DTensor of TorchRec's, as sharded collections may have in state dicts."""
    if not isinstance(value, DTensor):
        return False
    # Otherwise it would be a view for autograd, and no wrapper any more.
    with torch.no_grad():
        return isinstance(value.to_local(), LocalShardsWrapper)


def _refuse_several(config: CCEEmbeddingBagConfig, state: Mapping[str, Any], prefix: str) -> None:
    """Refuses what is no one number where a table has one."""
    for own in ("clusterings", "num_helper_rows"):
        name = f"{prefix}codes.{config.name}.{own}"
        value = state.get(name, torch.zeros(()))
        if not isinstance(value, torch.Tensor) or value.numel() != 1:
            found = list(value.size()) if isinstance(value, torch.Tensor) else value
            raise ValueError(
                f"table {config.name!r}: the checkpoint has {found} in {name!r}, the model one "
                "number; give what state_dict() has there"
            )


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


def _tell_of_clusterings(
    config: CCEEmbeddingBagConfig, state: Mapping[str, Any], prefix: str
) -> None:
    codes, count = codes_key(prefix, config.name), f"{prefix}codes.{config.name}.clusterings"
    if codes in state and count not in state and config.helper_rows:
        logger.warning(
            "table %r: the state dict has %r and not %r; ids find helper rows by that number, "
            "and the table is wrong unless it has had as many clusterings",
            config.name,
            codes,
            count,
        )
