"""What a checkpoint holds, down to its clusters, and which of its files are damaged."""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from cce_torchrec.checkpoint.folder import find, read_manifest, verify
from cce_torchrec.checkpoint.health import table_health
from cce_torchrec.checkpoint.health_parts import keys_of, packing_of
from cce_torchrec.checkpoint.info import is_final
from cce_torchrec.checkpoint.location import location
from cce_torchrec.checkpoint.manifest import CCETableRecord, Manifest, TableRecord
from cce_torchrec.checkpoint.saved_state import SavedState
from cce_torchrec.checkpoint.tables import choose_tables

Json = dict[str, Any]
_REMEDY = "; load another checkpoint"
_FLOAT32 = 4


def open_checkpoint(folder: str | Path) -> tuple[Path, Manifest]:
    """The checkpoint that is meant by `folder`, itself or the latest one in it.

    Raises:
        ValueError: there is none, it is of another format, damaged, or may not be read.
    """
    where = location(folder)
    if not where.exists():
        raise ValueError(f"{folder} is not there")
    if where.is_file():
        raise ValueError(f"{folder} is a file; give the folder of a checkpoint, or of a job")
    path = find(where)
    try:
        return path, read_manifest(path)
    except ValueError as error:
        if isinstance(error.__cause__, OSError):  # nothing is wrong with the file itself
            raise ValueError(f"{path} cannot be read ({error.__cause__})") from error
        raise


def inspect_checkpoint(
    folder: str | Path, tables: Sequence[str] | None = None, *, fast: bool = False
) -> Json:
    """What a checkpoint says of itself, and what its files and tables are like, as plain JSON.

    It goes on after files that are damaged, with what can be read.

    Args:
        folder: of a checkpoint, or of a job whose latest one is meant; local or a URI.
        tables: those whose health is wanted, by name or `collection.name`; None is all.
        fast: read the manifest only.

    Returns:
        path, step, format, world_size, versions, extra, schedule, finalized; bytes (of all files);
        files (name: bytes, and what is wrong); damaged (names); dense (tensors and bytes of what
        is no table); tables, each with its record, bytes, optimizer, `health` (health.py), None
        where it was not wanted or could not be read, and then `not_read` says why.

    Raises:
        ValueError: there is no checkpoint, of a format that is read, or no such table.
    """
    path, manifest = open_checkpoint(folder)
    wanted = manifest.tables.keys() if tables is None else choose_tables(
        tables, manifest.tables, "--table")  # fmt: skip
    out = _of_manifest(path, manifest)
    if fast:
        return out
    # All files first: what is read of a damaged one may look like anything.
    found = damage(path, manifest)
    out["damaged"] = sorted(found)
    for name, what in found.items():
        out["files"][name]["damage"] = what
    try:
        state = SavedState(path, manifest)
    except (ValueError, OSError) as error:
        for table in out["tables"]:
            table["not_read"] = _short(error)
        # A whole index that is of no use is no damage that a checksum shows.
        out["damaged"] = out["damaged"] or ["tensors.json"]
        return out
    _of_tensors(out, manifest, state)
    chosen = [table for table in out["tables"] if table["name"] in wanted]
    for table in shown(chosen, "tables"):
        _add_health(table, manifest, state, found)
    return out


def damage(checkpoint: Path, manifest: Manifest) -> dict[str, str]:
    """What is wrong with each file that is missing, short or changed."""
    out = {}
    for name, expected in shown(manifest.files.items(), "files"):
        try:
            verify(checkpoint, {name: expected})
        except (ValueError, OSError) as error:
            out[name] = _short(error).removeprefix(f"{checkpoint / name} ")
    return out


def shown(items: Any, what: str) -> Any:
    """`items`, with a bar on a terminal: checkpoints may take minutes to read."""
    return tqdm(items, desc=what, leave=False, disable=not sys.stderr.isatty())


def _short(error: BaseException) -> str:
    return str(error).removesuffix(_REMEDY)


def _of_manifest(path: Path, manifest: Manifest) -> Json:
    schedule = manifest.schedule
    return {
        "path": str(path),
        "step": manifest.step,
        "format": manifest.format,
        "world_size": manifest.world_size,
        "versions": manifest.versions,
        "extra": manifest.extra,
        "schedule": None
        if schedule is None
        else {
            "steps": sorted(schedule.steps),
            "interval": schedule.interval,
            "final": schedule.final,
            "rare": None if schedule.rare is None else sorted(schedule.rare),
        },
        "finalized": sorted(name for name, table in manifest.tables.items() if is_final(table)),
        "bytes": sum(one.size for one in manifest.files.values()),
        "files": {name: {"bytes": f.size, "damage": None} for name, f in manifest.files.items()},
        "damaged": None,
        "dense": None,
        "tables": [_table(name, table, manifest) for name, table in manifest.tables.items()],
    }


def _table(name: str, table: TableRecord, manifest: Manifest) -> Json:
    """What the manifest alone says of a table; rows are taken to be float32."""
    keys = [f"optimizer.{key}" for key in manifest.optimizers]
    own = [key.removeprefix("optimizer.") for key in keys_of(keys, {name: table})[name]]
    records = [manifest.optimizers[key] for key in own]
    state = sum(
        math.prod(shape) * _itemsize(record.dtypes.get(key, "float32"))
        for record in records
        for key, shape in record.state.items()
    )
    rows, codes = table.num_embeddings, 0
    if isinstance(table, CCETableRecord):
        rows = table.num_rows + table.num_helper_rows
        codes = packing_of(table).nbytes(table.num_embeddings, table.num_chunks)
    # The manifest does not say the type of rows.
    values = rows * table.embedding_dim
    return {
        "name": name,
        **{key: value for key, value in table.to_json().items() if key not in ("name",)},
        "bytes": {"rows": _FLOAT32 * values, "codes": codes, "notes": None, "optimizer": state},
        "full_bytes": _FLOAT32 * table.num_embeddings * table.embedding_dim,
        "optimizer": records[0].kind if records else None,
        "learning_rate": records[0].settings.get("lr") if records else None,
        "health": None,
        "not_read": None,
    }


def _itemsize(dtype: str) -> int:
    return int(getattr(torch, dtype).itemsize)


def _of_tensors(out: Json, manifest: Manifest, state: SavedState) -> None:
    """Adds the bytes that tensors really take."""
    by_table = keys_of(state.tensors, manifest.tables)
    for table in out["tables"]:
        size = dict.fromkeys(("rows", "codes", "notes", "optimizer"), 0)
        itemsize = _FLOAT32
        for key in by_table[table["name"]]:
            what = _kind_of(key)
            size[what] += state.nbytes(key)
            itemsize = state.dtype(key).itemsize if what == "rows" else itemsize
        table["bytes"] = size
        table["full_bytes"] = itemsize * table["num_embeddings"] * table["embedding_dim"]
    own = {key for keys in by_table.values() for key in keys}
    dense = [key for key in state.tensors if key not in own]
    out["dense"] = {
        kind: {
            "tensors": sum(key.startswith(f"{kind}.") for key in dense),
            "bytes": sum(state.nbytes(key) for key in dense if key.startswith(f"{kind}.")),
        }
        for kind in ("model", "optimizer")
    }


def _kind_of(key: str) -> str:
    """What a tensor of a table is part of."""
    if key.startswith("optimizer."):
        return "optimizer"
    name = key.rpartition(".")[2]
    return {"weight": "rows", "codes": "codes"}.get(name, "notes")


def _add_health(
    table: Json, manifest: Manifest, state: SavedState, damaged: Collection[str]
) -> None:
    name = table["name"]
    keys = keys_of(state.tensors, {name: manifest.tables[name]})[name]
    # Shards of one table may be in files of several ranks.
    bad = sorted({file for key in keys for file in state.files(key)} & set(damaged))
    if bad:
        table["not_read"] = f"{', '.join(bad)} {'is' if len(bad) == 1 else 'are'} damaged"
        return
    try:
        table["health"] = table_health(name, manifest, state)
    except (ValueError, OSError) as error:
        table["not_read"] = _short(error)
