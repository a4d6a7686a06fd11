"""One table in place of several: features keep ids of their own, and share codebooks."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from functools import partial
from typing import Any

import torch
from torchrec.modules.embedding_configs import BaseEmbeddingConfig, PoolingType

from cce_torchrec.config import is_cce
from cce_torchrec.config_checks import finite_number, unsupported_field


def joint_table(
    tables: Iterable[BaseEmbeddingConfig], name: str = "joint", *, room: float = 0.0
) -> dict[str, Any]:
    """The fields of one CCE table that all features of the plain `tables` read.

    Ids of one table follow those of another (`CCEEmbeddingBagConfig.id_ranges`), so that none share
    an embedding that did not, and all share codebook rows: a budget need not be divided. Those of
    another table begin with another chunk (`rotate_chunks`). Where a
    network has many tables of rare ids this gains as much as twice the bytes (docs/results.md);
    where it multiplies the embeddings of two features (GMF, two towers) it loses much.

    Args:
        tables: of one embedding_dim, data_type and pooling; their bounds of initial values are
            averaged by ids.
        name: of the new table.
        room: ids that are left free behind those of each table, as a part of their number, so that
            a later model may have more (`load_checkpoint(grow=)`). An unused id costs its code.

    Returns:
        For `CCEEmbeddingBagConfig(**fields, num_rows=...)`, `from_bytes` or `from_params_per_dim`.

    Raises:
        ValueError: fewer than two tables, one that is compressed, has values of its own kind
            (`init_fn`) or an option that CCE tables do not have, or tables that differ, or read one
            feature.
    """
    tables = list(tables)
    finite_number(f"table {name!r}", "room", room, 0.0)
    if len(tables) < 2:
        raise ValueError(f"table {name!r}: {len(tables)} tables to join; give two or more")
    ranges: dict[str, range] = {}
    start = 0
    for table in tables:
        _refuse(table, tables[0], name)
        for feature in table.feature_names or [table.name]:
            if feature in ranges:
                raise ValueError(
                    f"feature {feature!r} is read by table {table.name!r} and another of those to "
                    "join, so that its ids would be two of one table's; leave one of them out"
                )
            # Features of one table go on sharing its ids.
            ranges[feature] = range(start, start + table.num_embeddings)
        start += math.ceil(table.num_embeddings * (1 + room))
    ids = sum(table.num_embeddings for table in tables)
    # One table has one range of initial values, whoever's ids a row serves.
    low = sum(table.get_weight_init_min() * table.num_embeddings for table in tables)
    high = sum(table.get_weight_init_max() * table.num_embeddings for table in tables)
    return {
        "name": name,
        "num_embeddings": start,
        "feature_names": list(ranges),
        "id_ranges": ranges,
        "rotate_chunks": True,
        "weight_init_min": low / ids,
        "weight_init_max": high / ids,
        **shape_of(tables[0]),
    }


def _refuse(table: BaseEmbeddingConfig, first: BaseEmbeddingConfig, name: str) -> None:
    """Raises ValueError if `table` cannot be one with `first`, as the joint table `name`."""
    if is_cce(table):
        raise ValueError(f"table {table.name!r} is compressed already; join plain ones")
    same = shape_of(first)
    for field, value in shape_of(table).items():
        if value != same[field]:
            raise ValueError(
                f"table {name!r}: {field} of {first.name!r} is {same[field]}, and of "
                f"{table.name!r} {value}; join tables that agree"
            )
    # What would be refused of a single table must not be lost in a joint one.
    unsupported = unsupported_field(table)
    if unsupported:
        raise ValueError(
            f"table {table.name!r}: {unsupported}={getattr(table, unsupported)!r} has no meaning "
            "for a CCE table; leave it at its default, or the table out"
        )
    if not has_default_init(table):
        raise ValueError(
            f"table {table.name!r} has an init_fn of its own, which one table cannot have for "
            "some ids alone; leave it out, or the table"
        )


def shape_of(table: BaseEmbeddingConfig) -> dict[str, Any]:
    """What tables have to agree in to be joined."""
    return {
        "embedding_dim": table.embedding_dim,
        "data_type": table.data_type,
        "pooling": getattr(table, "pooling", PoolingType.SUM),  # which sequences do not have
    }


def has_default_init(config: BaseEmbeddingConfig) -> bool:
    """Whether `init_fn` is what TorchRec fills in: uniform between the config's bounds."""
    low, high = config.get_weight_init_min(), config.get_weight_init_max()
    return (
        isinstance(config.init_fn, partial)
        and config.init_fn.func is torch.nn.init.uniform_
        and config.init_fn.keywords == {"a": low, "b": high}
    )


def free_name(taken: Collection[str]) -> str:
    """A name for a joint table, which no other table has."""
    return next(name for i in range(len(taken) + 1) if (name := f"joint{i or ''}") not in taken)
