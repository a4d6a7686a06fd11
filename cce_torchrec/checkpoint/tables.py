"""What a checkpoint says about its tables, and how it is compared with a model's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import Field, fields, replace
from typing import Any

from torch import nn
from torchrec.distributed import DistributedModelParallel

from cce_torchrec.checkpoint.manifest import CCETableRecord, Reading, TableRecord
from cce_torchrec.checkpoint.matching import Matching
from cce_torchrec.chunk_order import first_chunk
from cce_torchrec.config import is_cce
from cce_torchrec.table import named

# Of our collections, of EmbeddingBagCollection and of EmbeddingCollection: where tables are.
_CONTAINERS = ("codes.", "embedding_bags.", "embeddings.")


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's module inside DistributedModelParallel, whose paths name tables."""
    return model.module if isinstance(model, DistributedModelParallel) else model


def describe_tables(model: nn.Module) -> dict[str, TableRecord]:
    """Every table of every collection of `model`, by its full name."""
    out: dict[str, TableRecord] = {}
    inside: list[str] = []
    for path, module in unwrapped(model).named_modules():
        # A CCE collection has one of TorchRec's inside, whose tables are the chunks of its own.
        if any(path.startswith(f"{outer}.") or not outer for outer in inside):
            continue
        configs = configs_of(module)
        if configs:
            inside.append(path)
        for config in configs:
            record = _record(path, config, _reading(module, config))
            out[record.full_name] = record
    return out


def _reading(module: nn.Module, config: Any) -> Reading:
    """How the collection `module`, sharded or not, reads one of its tables."""
    # Collections of sequences have neither, whatever their tables are configured as.
    bags = hasattr(module, "embedding_bag_configs") or bool(_own(module, "embedding_bag_configs"))
    weighted = getattr(module, "is_weighted", None) or (lambda: _own(module, "is_weighted"))
    return Reading(
        features=list(config.feature_names or [config.name]),
        pooling=config.pooling.name if bags else "NONE",
        weighted=bool(weighted()) if bags else False,
    )


def _own(module: nn.Module, name: str) -> Any:
    """What TorchRec's sharded modules keep of an option; None if they do not."""
    return getattr(module, f"_{name}", None)


def _record(collection: str, config: Any, reading: Reading) -> TableRecord:
    kind = CCETableRecord if is_cce(config) else TableRecord
    names = {field.name for field in fields(kind)} - {"collection", "reading"}
    found = {name: getattr(config, name) for name in names}
    # JSON has no ranges.
    if found.get("id_ranges"):
        found["id_ranges"] = {f: [ids.start, ids.stop] for f, ids in config.id_ranges.items()}
    return kind(collection=collection, reading=reading, **found)


def configs_of(module: nn.Module) -> list[Any]:
    """The tables of a collection as configured, sharded or not; empty for any other module."""
    for name in ("embedding_bag_configs", "embedding_configs"):
        if callable(getattr(module, name, None)):
            return list(getattr(module, name)())
        if hasattr(module, f"_{name}"):  # TorchRec's sharded modules
            return list(getattr(module, f"_{name}"))
    return []


def table_of(key: str, tables: dict[str, TableRecord]) -> str | None:
    """The table, by its full name, that the state `key` belongs to; None for the rest."""
    for full_name, table in tables.items():
        prefix = f"{table.collection}." if table.collection else ""
        if not key.startswith(prefix):
            continue
        rest = key[len(prefix) :]
        for container in _CONTAINERS:
            _, found, after = f".{rest}".partition(f".{container}")
            if found and after.startswith((f"{table.name}.", f"{table.name}#")):
                return full_name
    return None


def choose_tables(names: Sequence[str], tables: dict[str, TableRecord], argument: str) -> set[str]:
    """Full names of `names`, which may leave out the collection.

    Raises:
        ValueError: naming what no table is called.
    """
    return named(names, tables, argument)


def match_tables(
    saved: dict[str, TableRecord],
    current: dict[str, TableRecord],
    wanted: set[str] | None,
    grow: set[str],
    *,
    strict: bool,
) -> Matching:
    """Which tables of a checkpoint are loaded into which of the model's, and which are not.

    Args:
        saved: the checkpoint's.
        current: the model's.
        wanted: the tables that are loaded; None is all, and then both sides have the same.
        grow: tables that may have more ids in the model than in the checkpoint.
        strict: refuse what does not match; otherwise every table may grow.

    Raises:
        ValueError: naming each table, what the checkpoint has and what the model has.
    """
    out, wrong = Matching(), []
    remedy = "tables=[...] names it" if wanted else "pass tables=[...] to load some of them"
    remedy += ", or strict=False to load what matches"
    for name in sorted((set(saved) | set(current)) if wanted is None else wanted):
        if name not in saved:
            out.new.add(name)
            wrong.append(
                f"table {name!r}: the model has it, the checkpoint has {sorted(saved)}; {remedy}"
            )
        elif name not in current:
            out.missing.add(name)
            wrong.append(
                f"table {name!r}: the checkpoint has it, the model has {sorted(current)}; {remedy}"
            )
        else:
            may_grow = name in grow or (not strict and _can_grow(saved[name], current[name]))
            found = _differences(saved[name], current[name], may_grow)
            wrong += [f"table {name!r}: {difference}" for difference in found]
            if found:
                out.conflicts[name] = _conflict(saved[name], current[name])
            elif current[name].num_embeddings > saved[name].num_embeddings:
                out.grown.add(name)
    if wrong and strict:
        raise ValueError("; ".join(wrong))
    return out


def _can_grow(saved: TableRecord, current: TableRecord) -> bool:
    if isinstance(current, CCETableRecord) and isinstance(saved, CCETableRecord):
        if current.id_ranges != saved.id_ranges and _ids_stay(saved, current):
            return current.num_embeddings >= saved.num_embeddings
        if current.hash_ids:
            return False
    return current.num_embeddings > saved.num_embeddings


def _conflict(saved: TableRecord, current: TableRecord) -> str:
    """Both shapes, and what else differs."""
    there, here = ([one.num_embeddings, one.embedding_dim] for one in (saved, current))
    told = [f"shape {there} in the checkpoint, {here} in the model"]
    if saved.kind != current.kind:
        return f"{told[0]}; a {saved.kind} table in the checkpoint, a {current.kind} one here"
    for one in _compared(current):
        before, now = getattr(saved, one.name), getattr(current, one.name)
        if before != now and one.name not in ("num_embeddings", "embedding_dim"):
            told.append(f"{one.name} {before} in the checkpoint, {now} in the model")
    return "; ".join(told)


def _compared(record: TableRecord) -> list[Field[Any]]:
    """What a load compares: a feature may be renamed."""
    return [one for one in fields(record) if one.compare]


def _differences(saved: TableRecord, current: TableRecord, may_grow: bool) -> list[str]:
    if saved.kind != current.kind:
        return [f"the checkpoint has a {saved.kind} table, the model a {current.kind} one"]
    hashed = isinstance(current, CCETableRecord) and current.hash_ids
    # Into ranges that stay raw ids are hashed as before: by the range, not by the table.
    if may_grow and hashed and not _ids_stay(saved, current):
        return ["grow needs ids that stay; with hash_ids a larger table renumbers all raw ids"]
    differing = [
        field.name
        for field in _compared(current)
        if getattr(saved, field.name) != getattr(current, field.name)
    ]
    if may_grow and current.num_embeddings > saved.num_embeddings:
        differing.remove("num_embeddings")
    if may_grow and "id_ranges" in differing and _ids_stay(saved, current):
        differing.remove("id_ranges")
    budgets = _budgets(saved, current)
    if budgets:  # one difference, of which both numbers of rows tell a part
        differing = [name for name in differing if name not in ("num_rows", "num_helper_rows")]
    return budgets + [_difference(name, saved, current) for name in differing]


def _ids_stay(saved: TableRecord, current: TableRecord) -> bool:
    """Whether every feature that both have reads the ids that it had, and perhaps more.

    More of raw ids would hash all of them anew.
    """
    if not (isinstance(saved, CCETableRecord) and isinstance(current, CCETableRecord)):
        return False
    if saved.id_ranges is None or current.id_ranges is None:
        return False
    names = saved.id_ranges.keys() & current.id_ranges
    both = [(saved.id_ranges[name], current.id_ranges[name]) for name in names]
    # Ranges that come in between would have later ones begin with other chunks.
    if current.rotate_chunks and any(_chunk(saved, n) != _chunk(current, n) for n in names):
        return False
    return bool(both) and all(
        now[0] == first and (now[1] == end or (now[1] > end and not current.hash_ids))
        for (first, end), now in both
    )


def _chunk(table: CCETableRecord, feature: str) -> int:
    """The chunk that the embeddings of a feature of a joint table begin with."""
    ranges = table.id_ranges or {}
    starts = [start for start, _ in ranges.values()]
    return first_chunk(starts, ranges[feature][0], table.num_chunks)


def _budgets(saved: TableRecord, current: TableRecord) -> list[str]:
    """What differs where one side is finalized, and has its rows in main alone."""
    if not (isinstance(saved, CCETableRecord) and isinstance(current, CCETableRecord)):
        return []
    here, helper = current.num_rows, current.num_helper_rows
    there, saved_helper = saved.num_rows, saved.num_helper_rows
    if not saved_helper and helper and there != here + helper:
        return [
            f"the checkpoint has it finalized, with num_rows {there}, and the model has num_rows "
            f"{here} and num_helper_rows {helper}, which are {here + helper} once finalized; "
            f"configure the table as it was saved: the two make up {there}"
        ]
    if not helper and saved_helper and there + saved_helper == here:
        return [
            f"the model has it finalized, with num_rows {here}, and the checkpoint has num_rows "
            f"{there} and num_helper_rows {saved_helper}; build the model anew, as it was before "
            "`finalize`"
        ]
    return []


def _difference(field: str, saved: TableRecord, current: TableRecord) -> str:
    """What differs, and what to do."""
    before, now = getattr(saved, field), getattr(current, field)
    remedy = "configure the table as it was saved"
    if field == "track_counts":
        remedy = f"pass track_counts={before}, which shrinks vectors by counts or does not"
    if field == "learned_codes":
        lacks = "model" if before else "checkpoint"
        return f"the {lacks} has no codes, the other side has; {remedy}"
    if field == "id_ranges":
        remedy += f"; later ends, and more or fewer features, are taken by grow=[{current.name!r}]"
        if getattr(current, "rotate_chunks", False):
            remedy += ", if ranges keep their number, by which rotate_chunks goes"
    if field == "num_embeddings" and now > before:
        new = "ids then start from their hash" if saved.kind == "CCE" else "rows stay as they are"
        remedy += f", or pass grow=[{current.name!r}]: new {new}"
    return f"{field} is {before} in the checkpoint, {now} in the model; {remedy}"


def is_finalized(saved: TableRecord, current: TableRecord) -> bool:
    """Whether main has in `saved` the rows that main and helper have in `current`."""
    if not (isinstance(saved, CCETableRecord) and isinstance(current, CCETableRecord)):
        return False
    if not (current.learned_codes and current.num_helper_rows):
        return False
    if not (saved.num_embeddings == current.num_embeddings or _can_grow(saved, current)):
        return False
    rows = current.num_rows + current.num_helper_rows
    ids = current.num_embeddings
    ranges = current.id_ranges if _ids_stay(saved, current) else saved.id_ranges
    # All else has to agree: a table that is not loaded stays as it is.
    same = replace(saved, num_embeddings=ids, id_ranges=ranges)
    return same == replace(current, num_rows=rows, num_helper_rows=0)
