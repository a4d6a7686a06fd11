"""What a checkpoint says about its tables, and how it is compared with a model's."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from torch import nn
from torchrec.distributed import DistributedModelParallel

from cce_torchrec.config import is_cce

_SHAPE = ("num_embeddings", "embedding_dim", "num_chunks", "num_rows", "num_helper_rows")
_CCE = (*_SHAPE, "seed", "learned_codes", "track_seen", "hash_ids")
_PLAIN = ("num_embeddings", "embedding_dim")
_CONTAINERS = ("codes.", "embedding_bags.", "embeddings.")

Tables = dict[str, dict[str, Any]]
"""Per path of a collection and name of a table in it, `collection.table`: its description."""


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's module inside DistributedModelParallel, whose paths name tables."""
    return model.module if isinstance(model, DistributedModelParallel) else model


def describe_tables(model: nn.Module) -> Tables:
    """Every table of every collection of `model`, by its full name."""
    out: Tables = {}
    inside: list[str] = []
    for path, module in unwrapped(model).named_modules():
        if any(path.startswith(f"{outer}.") or not outer for outer in inside):
            continue
        configs = configs_of(module)
        if not configs:
            continue
        inside.append(path)
        for config in configs:
            compressed = is_cce(config)
            fields = {name: getattr(config, name) for name in (_CCE if compressed else _PLAIN)}
            out[f"{path}.{config.name}" if path else config.name] = {
                "collection": path,
                "name": config.name,
                "kind": "CCE" if compressed else "plain",
                **fields,
            }
    return out


def configs_of(module: nn.Module) -> list[Any]:
    """The tables of a collection as configured, sharded or not; empty for any other module."""
    for name in ("embedding_bag_configs", "embedding_configs"):
        if callable(getattr(module, name, None)):
            return list(getattr(module, name)())
        if hasattr(module, f"_{name}"):  # TorchRec's sharded modules
            return list(getattr(module, f"_{name}"))
    return []


def table_of(key: str, tables: Tables) -> str | None:
    """The table, by its full name, that the state `key` belongs to; None for the rest."""
    for full_name, table in tables.items():
        prefix = f"{table['collection']}." if table["collection"] else ""
        if not key.startswith(prefix):
            continue
        rest = key[len(prefix) :]
        for container in _CONTAINERS:
            _, found, after = f".{rest}".partition(f".{container}")
            if found and after.startswith((f"{table['name']}.", f"{table['name']}#")):
                return full_name
    return None


def choose_tables(names: Sequence[str], tables: Tables, argument: str) -> set[str]:
    """Full names of `names`, which may leave out the collection.

    Raises:
        ValueError: naming what no table is called.
    """
    chosen: set[str] = set()
    for name in names:
        found = {full for full, t in tables.items() if name in (full, t["name"])}
        if not found:
            raise ValueError(f"{argument}: no table {name!r}; the model has {sorted(tables)}")
        chosen |= found
    return chosen


def compare_tables(saved: Tables, own: Tables, wanted: set[str] | None, grow: set[str]) -> None:
    """Refuses a checkpoint whose tables do not fit the model's.

    Args:
        wanted: the tables that are loaded; None is all, and then both sides have the same.
        grow: tables that may have more ids in the model than in the checkpoint.

    Raises:
        ValueError: naming each table, what the checkpoint has and what the model has.
    """
    wrong: list[str] = []
    remedy = "tables=[...] names it" if wanted else "pass tables=[...] to load some of them"
    for name in sorted((set(saved) | set(own)) if wanted is None else wanted):
        if name not in saved:
            wrong.append(
                f"table {name!r}: the model has it, the checkpoint has {sorted(saved)}; {remedy}"
            )
        elif name not in own:
            wrong.append(
                f"table {name!r}: the checkpoint has it, the model has {sorted(own)}; {remedy}"
            )
        else:
            wrong += _differences(name, saved[name], own[name], name in grow)
    if wrong:
        raise ValueError("; ".join(wrong))


def _is_finalized(saved: dict[str, Any], own: dict[str, Any]) -> bool:
    """Whether main has in `saved` the rows that main and helper have in `own`."""
    rows = own["num_rows"] + own["num_helper_rows"]
    return (saved["num_rows"], saved["num_helper_rows"]) == (rows, 0)


def _differences(
    name: str, saved: dict[str, Any], own: dict[str, Any], may_grow: bool
) -> list[str]:
    who = f"table {name!r}"
    if saved["kind"] != own["kind"]:
        return [f"{who}: the checkpoint has a {saved['kind']} table, the model a {own['kind']} one"]
    if may_grow and own["kind"] == "plain":
        return [f"{who}: grow needs a CCE table, whose new ids start from their hash; it is plain"]
    if may_grow and own["hash_ids"]:
        return [
            f"{who}: grow needs ids that stay; with hash_ids a larger table renumbers all raw ids"
        ]
    fields = _differing(saved, own, _CCE if own["kind"] == "CCE" else _PLAIN)
    if may_grow and own["num_embeddings"] > saved["num_embeddings"]:
        fields.remove("num_embeddings")
    return [f"{who}: {_difference(field, saved, own)}" for field in fields]


def _difference(field: str, saved: dict[str, Any], own: dict[str, Any]) -> str:
    """What differs, and what to do."""
    remedy = "configure the table as it was saved"
    if field == "learned_codes":
        lacks = "model" if saved[field] else "checkpoint"
        return f"the {lacks} has no codes, the other side has; {remedy}"
    if field == "num_rows" and _is_finalized(saved, own):
        remedy += ", by config.finalized()"
    if field == "num_embeddings" and own["kind"] == "CCE" and own[field] > saved[field]:
        remedy += f", or pass grow=[{own['name']!r}]: new ids then start from their hash"
    return f"{field} is {saved[field]} in the checkpoint, {own[field]} in the model; {remedy}"


def _differing(saved: dict[str, Any], own: dict[str, Any], fields: Collection[str]) -> list[str]:
    return [field for field in fields if saved.get(field) != own[field]]
