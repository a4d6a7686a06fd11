"""How two checkpoints differ: settings, tables, codes, embeddings, optimizer state, the rest.

Bit-equal are two checkpoints from which a job would go on alike: the same step, tables, schedule,
optimizers with their settings, extra state of modules, random states, and every tensor bit by bit,
however it is cut into shards and whatever format it is in. What a caller kept in `extra`, versions
of libraries and the number of ranks are compared and told, and do not count.
"""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from cce_torchrec.checkpoint.compare_tables import compare_table
from cce_torchrec.checkpoint.compare_tensors import compare_tensors
from cce_torchrec.checkpoint.folder import verify
from cce_torchrec.checkpoint.inspection import open_checkpoint, shown
from cce_torchrec.checkpoint.manifest import Manifest, OptimizerRecord
from cce_torchrec.checkpoint.saved_state import SavedState
from cce_torchrec.checkpoint.tables import table_of

Json = dict[str, Any]
_RANDOM = re.compile(r"rank-\d+\.json")


def compare_checkpoints(a: str | Path, b: str | Path) -> Json:
    """How two checkpoints differ, as plain JSON; both are read by the block, without a model.

    Args:
        a: folder of a checkpoint, or of a job whose latest one is meant; local or a URI.
        b: the other one.

    Returns:
        equal; a and b (paths); step, world_size, format, schedule ([a, b] where they differ, else
        None); versions, settings and extra (by name, [a, b]); optimizers (settings by name, [a, b],
        and the parameters that they are of); random_state (whether it differs, None where numbers
        of ranks do); objects (keys); tables: only_a, only_b, both (see `compare_table`); dense:
        only_a, only_b, differing, and the number of those that are equal.

    Raises:
        ValueError: one of them is no checkpoint that can be read, or is damaged.
    """
    (path, one), (other_path, other) = open_checkpoint(a), open_checkpoint(b)
    own, others = _opened(path, one), _opened(other_path, other)
    out: Json = {"equal": True, "a": str(path), "b": str(other_path)}
    out["step"] = _pair(one.step, other.step)
    out["world_size"] = _pair(one.world_size, other.world_size)
    out["format"] = _pair(one.format, other.format)
    out["versions"] = differing(one.versions, other.versions)
    out["schedule"] = _pair(*(one_.to_json()["schedule"] for one_ in (one, other)))
    (settings, extra), (other_settings, other_extra) = _settings(one.extra), _settings(other.extra)
    out["settings"], out["extra"] = (
        differing(settings, other_settings),
        differing(extra, other_extra),
    )
    out["optimizers"] = _optimizers(one, other)
    out["random_state"] = _random(one, other)
    out["objects"] = sorted(differing(own.objects, others.objects))
    out["tables"] = _tables(own, others)
    out["dense"] = _dense(own, others)
    out["equal"] = _counts(out)
    return out


def _opened(path: Path, manifest: Manifest) -> SavedState:
    """The tensors of a checkpoint all of whose files are as they were written."""
    for name, expected in shown(manifest.files.items(), f"checksums of {path.name}"):
        verify(path, {name: expected})
    return SavedState(path, manifest)


def differing(a: Any, b: Any, prefix: str = "") -> dict[str, list[Any]]:
    """Where two dictionaries differ, however deep: both values by the keys, joined with dots."""
    if isinstance(a, dict) and isinstance(b, dict):
        out: dict[str, list[Any]] = {}
        for key in [*a, *(key for key in b if key not in a)]:
            # None beside what the other side has: JSON has no value that says "is not there".
            out |= differing(a.get(key), b.get(key), f"{prefix}.{key}" if prefix else str(key))
        return out
    # NaN is the same as itself here, and True is not 1.
    return {} if repr(a) == repr(b) else {prefix: [a, b]}


def _pair(a: Any, b: Any) -> list[Any] | None:
    return None if a == b else [a, b]


def _settings(extra: Any) -> tuple[Json, Json]:
    """The settings among what a caller kept, as the training program keeps them; and the rest."""
    if not isinstance(extra, dict):
        return {}, {} if extra is None else {"extra": extra}
    settings = extra.get("settings")
    if not isinstance(settings, dict):
        return {}, extra
    return settings, {key: value for key, value in extra.items() if key != "settings"}


def _optimizers(one: Manifest, other: Manifest) -> list[Json]:
    """Differing settings, each once for all parameters that have them."""
    found: dict[str, Json] = {}
    for name in sorted({*one.optimizers, *other.optimizers}):
        changes = differing(_plain(one.optimizers.get(name)), _plain(other.optimizers.get(name)))
        if changes:
            entry = found.setdefault(repr(changes), {"changes": changes, "parameters": []})
            entry["parameters"].append(name)
    return list(found.values())


def _plain(record: OptimizerRecord | None) -> Json:
    return {} if record is None else {one.name: getattr(record, one.name) for one in fields(record)}


def _random(one: Manifest, other: Manifest) -> bool | None:
    # Each rank has its own, and there are others.
    if one.world_size != other.world_size:
        return None
    own, others = (
        {name: file for name, file in manifest.files.items() if _RANDOM.fullmatch(name)}
        for manifest in (one, other)
    )
    return own != others


def _tables(a: SavedState, b: SavedState) -> Json:
    own, others = a.manifest.tables, b.manifest.tables
    both = [name for name in own if name in others]
    return {
        "only_a": [name for name in own if name not in others],
        "only_b": [name for name in others if name not in own],
        "both": [compare_table(name, a, b) for name in shown(both, "tables")],
    }


def _dense(a: SavedState, b: SavedState) -> Json:
    """Whatever is of no table."""
    own, others = _keys(a), _keys(b)
    found = {key: compare_tensors(a, b, key) for key in own if key in others}
    return {
        "only_a": [key for key in own if key not in others],
        "only_b": [key for key in others if key not in own],
        "differing": {key: one for key, one in found.items() if not one["equal"]},
        "equal": sum(one["equal"] for one in found.values()),
    }


def _keys(state: SavedState) -> list[str]:
    tables = state.manifest.tables
    return [key for key in state.tensors if table_of(key.partition(".")[2], tables) is None]


def _counts(out: Json) -> bool:
    """Whether nothing of what counts differs."""
    tables, dense = out["tables"], out["dense"]
    # Neither `extra` nor versions: a job goes on alike from both.
    return not (
        out["step"]
        or out["schedule"]
        or out["optimizers"]
        or out["random_state"]
        or out["objects"]
        or any(tables[side] or dense[side] for side in ("only_a", "only_b"))
        or dense["differing"]
        or not all(table["equal"] for table in tables["both"])
    )
