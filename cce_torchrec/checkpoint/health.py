"""How clusters, rows and optimizer state of tables are: of tensors, checkpoints, live models.

The health of a model is plain JSON, which training writes to `health.json` at its end:

    {"step": 1200 or null, "tables": [TABLE, ...]}

TABLE of a CCE table and of a plain one:

    {"table": "collection.user", "kind": "CCE", "num_embeddings", "embedding_dim", "num_chunks",
     "num_rows", "num_helper_rows", "learned_codes", "clusterings", "dtype": "float32",
     "chunks": [CHUNK, ...], "optimizer": OPTIMIZER, "warnings": ["half of the main rows ..."]}
    {"table", "kind": "plain", "num_embeddings", "embedding_dim", "dtype", "rows": ROWS,
     "untouched": share of rows that no step has changed, null where this cannot be told,
     "optimizer", "warnings"}

CHUNK, of which `main` and `helper` are null where the rows could not be read:

    {"chunk": 0, "ids": 100000,
     "empty_codes": codes that no id has, which are main rows that no id reads,
     "dead_helper_rows": helper rows that no id reads,
     "imbalance": k * sum(c^2) / N^2 of the ids c of each code, 1 where all are equal (faiss's),
     "perplexity": exp of the entropy of the codes: as many that are used alike would have it,
     "largest": most ids of a code,
     "usage": {"edges", "counts"}: codes by their number of ids, in bins that grow,
     "main": ROWS, "helper": ROWS or null,
     "helper_energy": share of the helper in the sum of the squares of both rows over all ids}

ROWS, of which norms and counts are of every row, or of every m-th where there are over a million:

    {"rows", "looked_at", "zero": of the rows looked at, "not_finite": values of all rows,
     "norms": {"mean", "quantiles": {"min", "p5", "p25", "p50", "p75", "p95", "max"}, "edges",
               "counts"}}

OPTIMIZER, of which `values` are the mean absolute values of each row, of all chunks together:

    {"kind": "RowWiseAdagrad" or null, "bytes",
     "state": {"sum": {"values": as norms, "zero", "rows", "not_finite"}}}

Histograms have at most 64 bins: counts[i] is that of [edges[i], edges[i + 1]), the last edge
included. Numbers are rounded to six digits; what is not finite is null.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from cce_torchrec.checkpoint.distributions import count_histogram, distribution, rounded
from cce_torchrec.checkpoint.health_parts import (
    Block,
    Parts,
    Role,
    RowSums,
    Usage,
    keys_of,
    measure,
)
from cce_torchrec.checkpoint.health_warnings import warnings_of
from cce_torchrec.checkpoint.manifest import CCETableRecord, Manifest, TableRecord
from cce_torchrec.checkpoint.optimizers import optimizer_states
from cce_torchrec.checkpoint.save import model_state, optimizer_state
from cce_torchrec.checkpoint.saved_state import SavedState
from cce_torchrec.checkpoint.tables import describe_tables
from cce_torchrec.collectives import Ranks
from cce_torchrec.torchrec_internals import ShardedTensor

Json = dict[str, Any]
_SQUARES = ("sum", "exp_avg_sq", "max_exp_avg_sq")
"""State that adds up squares of gradients: where it is 0, no step has changed the row."""


def chunk_health(
    codes: torch.Tensor,
    main: torch.Tensor,
    helper: torch.Tensor | None = None,
    helper_codes: torch.Tensor | None = None,
    *,
    chunk: int = 0,
) -> Json:
    """CHUNK (see the module) of one chunk whose codes and rows are in memory.

    Args:
        codes: main row of each id, [N] of any integer type.
        main: [k, s].
        helper: [k', s], None without a helper.
        helper_codes: helper row of each id, [N].
        chunk: its number.
    """
    # As a codebook lies in memory.
    rows = main if helper is None else torch.cat([main, helper])
    sums = RowSums(tuple(rows.shape))
    sums.add((0, 0), rows, squares=True)
    none = torch.zeros(0, dtype=torch.int64, device="cpu")
    hashed = none if helper is None or helper_codes is None else helper_codes.long()
    usage = Usage(
        torch.bincount(codes.long(), minlength=len(main)).numpy(),
        torch.bincount(hashed, minlength=len(rows) - len(main)).numpy(),
    )
    return _chunk(chunk, usage, sums)


def checkpoint_health(manifest: Manifest, state: SavedState) -> Json:
    """The health (see the module) of a checkpoint, which is read by the block.

    Raises:
        ValueError, OSError: a file is damaged; `table_health` reads one table.
    """
    tables = [table_health(name, manifest, state) for name in manifest.tables]
    return {"step": manifest.step, "tables": tables}


def table_health(name: str, manifest: Manifest, state: SavedState) -> Json:
    """TABLE (see the module) of one table of a checkpoint, by its full name.

    Raises:
        ValueError, OSError: a file is damaged.
    """
    table = manifest.tables[name]
    keys = keys_of(state.tensors, {name: table})[name]
    whole_codes = manifest.has_whole_codes
    parts = measure(table, keys, _Saved(state), first=True, whole_codes=whole_codes)
    kinds = {f"optimizer.{key}": record.kind for key, record in manifest.optimizers.items()}
    size = sum(state.nbytes(key) for key in keys if key.startswith("optimizer."))
    return _table(table, parts, _kind(keys, kinds), size)


def model_health(
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer] = (),
    *,
    step: int | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> Json:
    """The health (see the module) of a live model, the same on every rank.

    Collective where tables are sharded. It equals that of a checkpoint of the same model.

    Args:
        model: unsharded, or under DistributedModelParallel.
        optimizers: those that the caller steps, as for `save_checkpoint`.
        step: optimizer steps so far, which is kept in the result.
        process_group: the ranks that share the tables; all by default.

    Raises:
        ValueError: on every rank, if it failed on any.
    """
    ranks = Ranks(process_group)
    states = ranks.each(lambda: optimizer_states(model, optimizers))
    state = ranks.each(lambda: model_state(model) | optimizer_state(states))
    tables = describe_tables(model)
    kinds = {f"optimizer.{name}": one.record().kind for name, one in states.items()}
    live, keys = _Live(state, ranks.rank), keys_of(state, tables)
    out = []
    for name, table in tables.items():
        # A table at a time, so that parts of large ones are not on every rank all at once.
        found = ranks.agree(
            lambda name=name, table=table: (  # type: ignore[misc]  # mypy infers no defaults
                measure(table, keys[name], live, first=ranks.rank == 0, whole_codes=False),
                _kind(keys[name], kinds),
                {key: _nbytes(state[key]) for key in keys[name] if key.startswith("optimizer.")},
            )
        )
        parts = Parts()
        sizes: dict[str, int] = {}
        for own, _, size in found:
            parts.merge(own)
            sizes |= size
        kind = next((kind for _, kind, _ in found if kind is not None), None)
        out.append(_table(table, parts, kind, sum(sizes.values())))
    return {"step": step, "tables": out}


class _Saved:
    """Blocks of rows of a checkpoint."""

    def __init__(self, state: SavedState) -> None:
        self._state = state

    def shape_of(self, key: str) -> tuple[int, ...]:
        """Of the whole tensor."""
        return self._state.shape(key)

    def blocks_of(self, key: str) -> Iterator[Block]:
        """All of it, rows in all their columns."""
        shape = self.shape_of(key)
        if not shape:
            yield (), self._state.whole(key)
            return
        for first, block in self._state.blocks(key):
            yield (first, *[0] * (len(shape) - 1)), block


class _Live:
    """What one rank has of a state dict."""

    def __init__(self, state: Json, rank: int) -> None:
        self._state, self._rank = state, rank

    def shape_of(self, key: str) -> tuple[int, ...]:
        """Of the whole tensor."""
        return tuple(self._state[key].size())

    def blocks_of(self, key: str) -> Iterator[Block]:
        """The shards of this rank."""
        value = self._state[key]
        if isinstance(value, ShardedTensor):
            for shard in value.local_shards():
                yield tuple(shard.metadata.shard_offsets), shard.tensor.detach()
        elif self._rank == 0 or not value.ndim:  # copies are the same on all; each needs scalars
            yield (0,) * value.ndim, value.detach()


def _nbytes(value: Any) -> int:
    dtype = value.metadata().tensor_properties.dtype if isinstance(value, ShardedTensor) else value
    return int(math.prod(value.size()) * dtype.itemsize)


def _kind(keys: Sequence[str], kinds: dict[str, str]) -> str | None:
    """The optimizer of the first of a table's parameters that has one."""
    parameters = {key.rpartition(".")[0] for key in keys if key.startswith("optimizer.")}
    # SGD keeps no state, and is found by the parameters of the model.
    parameters |= {f"optimizer.{key.removeprefix('model.')}" for key in keys}
    return next((kinds[name] for name in sorted(parameters) if name in kinds), None)


def _table(table: TableRecord, parts: Parts, kind: str | None, state_bytes: int) -> Json:
    """TABLE from what all ranks have found."""
    out: Json = {
        "table": table.full_name,
        "kind": table.kind,
        "num_embeddings": table.num_embeddings,
        "embedding_dim": table.embedding_dim,
    }
    types = {name for role, name in parts.types.items() if not role.state}
    own = {"dtype": min(types, default=None)}
    states = _states(parts)
    optimizer = {"kind": kind, "bytes": state_bytes, "state": states}
    if isinstance(table, CCETableRecord):
        names = ("num_chunks", "num_rows", "num_helper_rows", "learned_codes")
        out |= {name: getattr(table, name) for name in names}
        out |= {"clusterings": parts.clusterings} | own
        out["chunks"] = [
            _chunk(chunk, _usage(parts, chunk), parts.rows.get(Role(chunk, "")))
            for chunk in range(table.num_chunks)
        ]
    else:
        sums = parts.rows.get(Role(None, ""))
        out |= own | {"rows": None if sums is None else _rows(sums, sums.total())}
        out["untouched"] = _untouched(table, states)
    return out | {"optimizer": optimizer, "warnings": warnings_of(out)}


def _usage(parts: Parts, chunk: int) -> Usage:
    """Of all ids."""
    found = [usage for (own, _), usage in parts.usage.items() if own == chunk]
    # Each rank has counted its own ids.
    return Usage(np.sum([u.main for u in found], 0), np.sum([u.helper for u in found], 0))


def _chunk(chunk: int, usage: Usage, sums: RowSums | None) -> Json:
    """CHUNK from the ids of each row, and the sums of squares of the rows, main before helper."""
    counts = usage.main.astype(np.float64)
    ids, k = float(counts.sum()), len(counts)
    share = counts[counts > 0] / ids
    out: Json = {
        "chunk": chunk,
        "ids": int(ids),
        "empty_codes": int((counts == 0).sum()),
        "dead_helper_rows": int((usage.helper == 0).sum()),
        "imbalance": rounded(k * float((counts**2).sum()) / ids**2),
        "perplexity": rounded(float(np.exp(-(share * np.log(share)).sum()))),
        "largest": int(counts.max()),
        "usage": count_histogram(usage.main),
        "main": None,
        "helper": None,
        "helper_energy": None,
    }
    if sums is None:
        return out
    squares = sums.total()
    # More rows than are looked at have no division into main and helper that a sample would keep.
    split = -(-k // sums.stride)
    out["main"] = _rows(sums, squares[:split], of=k)
    if not len(usage.helper):
        return out | {"helper_energy": 0.0}
    out["helper"] = _rows(sums, squares[split:], of=len(usage.helper))
    looked_at = np.arange(len(squares)) * sums.stride
    energy = np.concatenate([usage.main, usage.helper])[looked_at] * squares
    whole = float(energy.sum())
    out["helper_energy"] = rounded(float(energy[split:].sum()) / whole) if whole else 0.0
    return out


def _rows(sums: RowSums, squares: np.ndarray[Any, Any], of: int | None = None) -> Json:
    """ROWS from the sums of squares of those looked at."""
    # float32 hides in which order columns were added up, which a plan decides.
    norms = np.sqrt(squares).astype(np.float32)
    return {
        "rows": sums.shape[0] if of is None else of,
        "looked_at": len(squares),
        "zero": int((squares == 0).sum()),
        "not_finite": sum(sums.not_finite.values()),
        "norms": distribution(norms),
    }


def _states(parts: Parts) -> Json:
    """The optimizer's state by name, over all chunks."""
    out: Json = {}
    for state in sorted({role.state for role in parts.rows if role.state}):
        own = [sums for role, sums in sorted(parts.rows.items(), key=_order) if role.state == state]
        values = np.concatenate([sums.total() / sums.columns for sums in own]).astype(np.float32)
        out[state] = {
            "rows": sum(sums.shape[0] for sums in own),
            "looked_at": len(values),
            "zero": int((values == 0).sum()),
            "not_finite": sum(sum(sums.not_finite.values()) for sums in own),
            "values": distribution(values),
        }
    return out


def _order(item: tuple[Role, RowSums]) -> int:
    return -1 if item[0].chunk is None else item[0].chunk


def _untouched(table: TableRecord, states: Json) -> float | None:
    """Share of rows whose accumulator is 0, which are as they were made."""
    found = [states[name] for name in _SQUARES if name in states]
    # Under column-wise plans FBGEMM has several numbers a row, which say nothing of whole rows.
    if not found or found[0]["rows"] != table.num_embeddings:
        return None
    return rounded(found[0]["zero"] / found[0]["looked_at"])
