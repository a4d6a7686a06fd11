"""Tables in a file of YAML or JSON, as `cce-torchrec plan` reads and `advise` writes them.

common:                  # may be left out; what all tables have that do not say otherwise
  embedding_dim: 64
tables:                  # or the list alone
  - name: user
    num_embeddings: 100_000_000
    table_bytes: 600MB   # or num_rows, or params_per_dim: a CCE table
  - name: country        # none of these: a plain table
    num_embeddings: 250
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, PoolingType

from cce_torchrec.byte_sizes import parse_bytes
from cce_torchrec.config import CCEEmbeddingBagConfig, is_cce
from cce_torchrec.yaml_files import MOST_BYTES, nearest, read_yaml, write_yaml

BUDGETS = ("num_rows", "params_per_dim", "table_bytes")
"""Any of which makes a table a CCE table."""
_PLAIN = ("name", "num_embeddings", "embedding_dim", "feature_names", "data_type", "pooling")
_NUMBERS = ("num_embeddings", "embedding_dim", "num_rows", "num_helper_rows", "params_per_dim",
            "num_chunks", "seed")  # fmt: skip
_FLAGS = ("count_codes", "learned_codes", "hash_ids", "track_seen", "track_counts",
          "rotate_chunks")  # fmt: skip
_OF_CCE = ("num_chunks", "num_helper_rows", "helper_ratio", "count_codes", "learned_codes", "seed",
           "hash_ids", "track_seen", "id_ranges", "recipe", "examples_per_id",
           "track_counts", "rotate_chunks")  # fmt: skip
KEYS = (*_PLAIN, "plain", *BUDGETS, *_OF_CCE)
"""That a table may have; `plain: true` keeps one plain for which `common` has a budget."""


def read_tables(file: str | Path) -> list[EmbeddingBagConfig]:
    """The tables in `file`, YAML or (`.json`) JSON, for `CCEEmbeddingBagCollection`.

    Raises:
        ValueError: naming the file, the table and the key that is unknown, missing or wrong.
        MissingExtra: pyyaml is not installed, which JSON does not need.
    """
    found = _read_json(Path(file)) if str(file).endswith(".json") else read_yaml(file)
    try:
        return _tables(found)
    except ValueError as error:
        # A value of the file that a message shows may be as long as the file.
        raise ValueError(f"{file}: {str(error)[:1000]}") from error


def tables_yaml(tables: Sequence[EmbeddingBagConfig]) -> str:
    """The tables as a file that `read_tables` reads; what is at its default is left out.

    Raises:
        MissingExtra: pyyaml is not installed.
    """
    return write_yaml({"tables": [_described(table) for table in tables]})


def _read_json(file: Path) -> Any:
    try:
        if file.stat().st_size > MOST_BYTES:
            raise ValueError(f"{file} has more than {MOST_BYTES:,} bytes: it is no file of tables")
        return json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_once)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{file} is no JSON that can be read: {error}") from error
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error.strerror or error})") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, of whose keys none stands twice."""
    out = dict(pairs)
    if len(out) < len(pairs):
        raise ValueError(f"a key stands twice among {[key for key, _ in pairs]}")
    return out


def _tables(found: Any) -> list[EmbeddingBagConfig]:
    if isinstance(found, list):
        found = {"tables": found}
    if not isinstance(found, dict) or not isinstance(found.get("tables"), list):
        raise ValueError("it holds no list of tables; write `tables:` and `- name: ...` below it")
    for key in found.keys() - {"tables", "common"}:
        raise ValueError(f"unknown key {key!r}{nearest(str(key), ('tables', 'common'))}")
    common = found.get("common") or {}
    _check_keys("common", common)
    for key in {"name", "feature_names", "id_ranges"} & common.keys():
        raise ValueError(f"common: {key} is of one table; give it there")
    if not found["tables"]:
        raise ValueError("the list of tables is empty; name one or more")
    tables = [_table(at, own, common) for at, own in enumerate(found["tables"], start=1)]
    # Collections refuse this as well, but not by the file.
    names = [table.name for table in tables]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"tables {twice} are named twice; a name is one table's alone")
    return tables


def _check_keys(who: str, found: Any) -> None:
    if not isinstance(found, dict):
        raise ValueError(f"{who} is {type(found).__name__}, and has to be lines `key: value`")
    for key in found:
        if key not in KEYS:
            raise ValueError(f"{who}: unknown key {key!r}{nearest(str(key), KEYS)}")


def _table(at: int, own: Any, common: Mapping[str, Any]) -> EmbeddingBagConfig:
    who = f"table {at}"
    _check_keys(who, own)
    if isinstance(own.get("name"), str):
        who = f"table {own['name']!r}"
    merged = dict(common) | own
    plain = merged.pop("plain", False)
    budgets = [name for name in BUDGETS if own.get(name) is not None]
    # A budget of its own replaces that of all.
    budgets = budgets or [name for name in BUDGETS if common.get(name) is not None]
    if len(budgets) > 1:
        raise ValueError(f"{who}: {' and '.join(budgets)} both say how many rows; give one")
    # Of `common` a plain table takes what plain tables have, and no more.
    if plain or not budgets:
        wrong = [name for name in (*BUDGETS, *_OF_CCE) if own.get(name) is not None]
        if wrong:
            raise ValueError(
                f"{who}: {wrong[0]} is of compressed tables; give one of {', '.join(BUDGETS)}, and "
                "not `plain: true`"
            )
        return EmbeddingBagConfig(**_values(who, {k: merged[k] for k in _PLAIN if k in merged}))
    kept = {name: value for name, value in merged.items() if name not in BUDGETS}
    values = _values(who, kept | {budgets[0]: merged[budgets[0]]})
    return _compressed(who, values, budgets[0])


def _compressed(who: str, values: dict[str, Any], budget: str) -> CCEEmbeddingBagConfig:
    rules = {"num_rows": (), "params_per_dim": ("helper_ratio", "count_codes"),
             "table_bytes": ("helper_ratio",)}[budget]  # fmt: skip
    for name in ("helper_ratio", "count_codes"):
        if name in values and name not in rules:
            raise ValueError(f"{who}: {name} does not go with {budget}; leave it out")
    if "num_helper_rows" in values and budget != "num_rows":
        raise ValueError(f"{who}: num_helper_rows goes with num_rows, and {budget} says both")
    if budget == "num_rows":
        return CCEEmbeddingBagConfig(**values)
    if budget == "params_per_dim":
        return CCEEmbeddingBagConfig.from_params_per_dim(values.pop(budget), **values)
    return CCEEmbeddingBagConfig.from_bytes(values.pop(budget), **values)


def _values(who: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Values of the keys as configurations have them."""
    out = {name: value for name, value in given.items() if value is not None}
    if not isinstance(out.get("name"), str) or not out["name"]:
        raise ValueError(f"{who} has no name that is text; give one")
    for name in ("num_embeddings", "embedding_dim"):
        if name not in out:
            raise ValueError(f"{who} has no {name}; give it, or for all tables in `common`")
    _convert_numbers(who, out)
    names = out.setdefault("feature_names", [out["name"]])
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or not names:
        raise ValueError(f"{who}: feature_names {names!r} are no names; write [user, friend]")
    out["feature_names"] = names
    for name, kind in (("data_type", DataType), ("pooling", PoolingType)):
        if name in out:
            out[name] = _member(who, name, kind, out[name])
    if "id_ranges" in out:
        out["id_ranges"] = _ranges(who, out["id_ranges"])
    return out


def _convert_numbers(who: str, out: dict[str, Any]) -> None:
    """Numbers, bytes and flags become what configurations take, in place."""
    for name in _NUMBERS:
        if name in out:
            least = 0 if name in ("seed", "num_helper_rows") else 1
            out[name] = _whole(who, name, out[name], least)
    if "table_bytes" in out:
        try:
            out["table_bytes"] = parse_bytes(out["table_bytes"])
        except ValueError as error:
            raise ValueError(f"{who}: table_bytes: {error}") from error
    for name in _FLAGS:
        # A number, or the text "no", would else be taken for true.
        if name in out and not isinstance(out[name], bool):
            raise ValueError(f"{who}: {name} {out[name]!r} is neither true nor false")
    for name in ("helper_ratio", "examples_per_id"):
        if name in out:
            out[name] = _real(who, name, out[name])


def _whole(who: str, name: str, value: Any, least: int) -> int:
    """A whole number; `1e9` too, which YAML takes for text."""
    try:
        number = float(str(value).replace("_", ""))
        whole = value if isinstance(value, int) else int(number)
    except (ValueError, OverflowError):
        number, whole = 0.5, 0
    if isinstance(value, bool) or number != whole or whole < least:
        raise ValueError(f"{who}: {name} {value!r} is no whole number of {least} or more")
    return whole


def _real(who: str, name: str, value: Any) -> float:
    try:
        return float("bool" if isinstance(value, bool) else value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{who}: {name} {value!r} is no number") from error


def _member(who: str, name: str, kind: Any, value: Any) -> Any:
    known = [member.name for member in kind if member.name != "NONE"]
    if str(value).upper() not in known:
        raise ValueError(f"{who}: {name} {value!r} is none of {', '.join(known)}")
    return kind[str(value).upper()]


def _ranges(who: str, found: Any) -> dict[str, range]:
    try:
        return {str(feature): range(start, stop) for feature, (start, stop) in found.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{who}: id_ranges {found!r} are no ranges; write {{user: [0, 100], item: [100, 150]}}"
        ) from error


def _described(table: EmbeddingBagConfig) -> dict[str, Any]:
    out: dict[str, Any] = {name: getattr(table, name) for name in _PLAIN[:3]}
    out["feature_names"] = list(table.feature_names)
    for name, default in (("data_type", DataType.FP32), ("pooling", PoolingType.SUM)):
        value = getattr(table, name)
        if value != default:
            out[name] = value.name.lower()
    if not is_cce(table):
        return out
    out |= {"num_chunks": table.num_chunks, "num_rows": table.num_rows}
    out["num_helper_rows"] = table.helper_rows
    defaults = {field.name: field.default for field in fields(CCEEmbeddingBagConfig)}
    for name in ("seed", "learned_codes", "hash_ids", "track_seen", "recipe", "examples_per_id",
                 "rotate_chunks"):  # fmt: skip
        if getattr(table, name) != defaults[name]:
            out[name] = getattr(table, name)
    # As it was resolved: by "auto", which the recipe has no trace of.
    if table.track_counts != (table.recipe != "frequent" and table.learned_codes):
        out["track_counts"] = table.track_counts
    if table.id_ranges:
        out["id_ranges"] = {name: [ids.start, ids.stop] for name, ids in table.id_ranges.items()}
    return out
