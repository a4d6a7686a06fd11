"""Checks of the fields of a CCE table; each raises ValueError with table, value and remedy."""

from __future__ import annotations

import itertools
import math
import numbers
import operator
import re
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any

from torch import nn
from torchrec.modules.embedding_configs import (
    BaseEmbeddingConfig,
    DataType,
    EmbeddingBagConfig,
    PoolingType,
)

_UNSUPPORTED_FIELDS = (
    "num_embeddings_post_pruning",
    "need_pos",
    "input_dim",
    "total_num_buckets",
    "use_virtual_table",
    "virtual_table_eviction_policy",
    "enable_embedding_update",
    "stash_weights",
)


def whole_number(who: str, name: str, value: Any) -> int:
    """`value` as a Python integer, NumPy's included."""
    try:
        return operator.index(value)
    except TypeError as error:
        raise ValueError(f"{who}: {name} {value!r} is not a whole number; round it") from error


def finite_number(who: str, name: str, value: Any, least: float = -math.inf) -> float:
    """`value` as it is, if it is a number that is finite and not below `least`."""
    if isinstance(value, int | float | numbers.Real) and least <= value < math.inf:  # type: ignore[operator]  # of NumPy
        return value  # type: ignore[return-value]
    of = f" of {least:g} or more" if least > -math.inf else ""
    raise ValueError(f"{who}: {name} {value!r} is no finite number{of}; give one")


def check_examples(who: str, examples_per_id: Any) -> None:
    """Refuses a mean number of examples of an id that is none; None is left to the recipe."""
    if examples_per_id is not None:
        finite_number(who, "examples_per_id", examples_per_id, 0.0)


def check_width(who: str, embedding_dim: int, num_chunks: int) -> None:
    """Refuses chunks of a width that FBGEMM cannot read."""
    # FBGEMM's kernels read four values at once, of each chunk's own table.
    unit = 4 * num_chunks
    if embedding_dim >= 1 and embedding_dim % unit == 0:
        return
    low = max(0, embedding_dim // unit * unit)
    allowed = f"{low} or {low + unit}" if low else f"{unit}"
    width, rest = divmod(embedding_dim, num_chunks)
    fault = "is not divisible by" if rest else f"is {width} times"
    raise ValueError(
        f"{who}: embedding_dim {embedding_dim} {fault} num_chunks "
        f"{num_chunks}; a chunk's width must be a multiple of 4 (FBGEMM reads 4 "
        f"values at once), use {allowed}"
    )


def unsupported_field(config: BaseEmbeddingConfig) -> str:
    """The first field of TorchRec's that says what no CCE table does; empty if none does."""
    # By TorchRec's own defaults, so that fields of later versions are compared as well.
    defaults = {field.name: field.default for field in fields(BaseEmbeddingConfig)}
    said = (n for n in _UNSUPPORTED_FIELDS if n in defaults and getattr(config, n) != defaults[n])
    return next(said, "")


def check_inherited_fields(who: str, config: EmbeddingBagConfig) -> None:
    """Refuses what TorchRec's own fields may say and a CCE table cannot do."""
    if not isinstance(config.pooling, PoolingType) or config.pooling not in (
        PoolingType.SUM,
        PoolingType.MEAN,
    ):
        raise ValueError(f"{who}: pooling {config.pooling!r} is not SUM or MEAN")
    if config.data_type not in (DataType.FP32, DataType.FP16, DataType.BF16):
        raise ValueError(
            f"{who}: data_type {config.data_type} cannot be trained; use FP32, FP16 or BF16"
        )
    name = unsupported_field(config)
    if name:
        raise ValueError(
            f"{who}: {name}={getattr(config, name)!r} has no meaning for a CCE table; "
            "leave it at its default"
        )


def check_id_ranges(
    who: str, ranges: dict[str, range] | None, features: Sequence[str], num_embeddings: int
) -> None:
    """Refuses ranges of other features, outside of the table, or that overlap in part."""
    if ranges is None:
        return
    if not isinstance(ranges, dict) or not all(isinstance(r, range) for r in ranges.values()):
        raise ValueError(
            f"{who}: id_ranges {ranges!r} is no dictionary of features to ranges; give "
            '{"user": range(0, 100), "item": range(100, 150)}'
        )
    if set(ranges) != set(features):
        raise ValueError(
            f"{who}: id_ranges are of features {sorted(ranges)}, and the table is read by "
            f"{sorted(features)}; give one for each"
        )
    for name, ids in ranges.items():
        if ids.step != 1 or not 0 <= ids.start < ids.stop <= num_embeddings:
            raise ValueError(
                f"{who}: the id_ranges of feature {name!r} are {ids}; give one id or more of "
                f"range(0, {num_embeddings}), by num_embeddings, one after the other"
            )
    # Neighbours alone: ranges that overlap are neighbours in this order, or equal.
    rising = sorted(ranges, key=lambda name: ranges[name].start)
    for one, other in itertools.pairwise(rising):
        if ranges[one] != ranges[other] and ranges[other].start < ranges[one].stop:
            raise ValueError(
                f"{who}: the id_ranges of features {one!r} and {other!r} are {ranges[one]} and "
                f"{ranges[other]}, which overlap; give the same ids or others"
            )


def check_rotation(who: str, rotate: Any, ranges: dict[str, range] | None) -> None:
    """Refuses a rotation of what has no ranges of ids to rotate by."""
    if rotate not in (True, False):
        raise ValueError(f"{who}: rotate_chunks {rotate!r} is no bool")
    if rotate and ranges is None:
        raise ValueError(
            f"{who}: rotate_chunks begins the embeddings of each range of ids with another chunk, "
            "and the table has no id_ranges; give some, or leave it out"
        )


def check_table_name(who: str, name: str) -> None:
    """Refuses names that no table can have."""
    if not is_table_name(name):
        raise ValueError(
            f"{who}: torch keeps tables as modules by their names, which hold no '.', and no '#', "
            "which marks the chunks of a CCE table, and are not those of attributes of a module, "
            "such as 'type' or 'items'; rename it"
        )


def is_table_name(name: str) -> bool:
    """Whether a table may be called so: torch keeps tables as modules, by their names."""
    return (
        isinstance(name, str)
        and bool(name)
        and not {".", "#"} & set(name)
        and not hasattr(nn.ModuleDict(), name)
    )


def table_names(features: Iterable[str]) -> dict[str, str]:
    """Names for tables of `features`: the same, but where no table may be called so."""
    wanted = list(features)
    out = {name: name for name in wanted if is_table_name(name)}
    for feature in wanted:
        if feature not in out:
            name = re.sub(r"[.#]", "_", feature)
            name = name if is_table_name(name) else f"{name}_table"
            while name in out.values():
                name += "_"
            out[feature] = name
    return {feature: out[feature] for feature in wanted}
