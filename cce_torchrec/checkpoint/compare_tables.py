"""How a table differs between two checkpoints."""

from __future__ import annotations

from typing import Any

import torch

from cce_torchrec.checkpoint.code_matching import Contingency
from cce_torchrec.checkpoint.compare_tensors import compare_tensors, relative
from cce_torchrec.checkpoint.manifest import CCETableRecord
from cce_torchrec.checkpoint.saved_state import SavedState
from cce_torchrec.checkpoint.saved_table import BLOCK, SavedTable
from cce_torchrec.codes.hashing import hash_function

Json = dict[str, Any]
SAMPLE = 1 << 17
"""Ids by whose embeddings large tables are compared; those of smaller ones are all compared."""
_SAMPLE_ROLE = 99
"""Parts the hash by which ids are drawn from all others."""


def compare_table(name: str, a: SavedState, b: SavedState) -> Json:
    """How a table that both checkpoints have differs.

    Returns:
        name; equal: nothing differs, bit by bit; config: fields of its record, [a, b];
        clusterings: [a, b] where they differ; codes: share of ids with another cluster by chunk,
        as `Contingency.changed` counts, None of plain tables and of other numbers of chunks;
        codes_equal: bit by bit; embeddings: `relative_norm` of the difference over those of a,
        over `ids` ids, `exact` if that is all of them; None where dimensions differ; tensors: what
        `compare_tensors` gives of all others (rows, optimizer state, notes) that differ; only_a,
        only_b: tensors of one side.
    """
    one, other = SavedTable(name, a), SavedTable(name, b)
    records = [table.record.to_json() for table in (one, other)]
    fields = {
        key: [records[0].get(key), records[1].get(key)]
        for key in {**records[0], **records[1]}
        if records[0].get(key) != records[1].get(key)
    }
    # Codes of older formats have other types and shapes, and are compared as what they say.
    same_codes, changed = _codes(one, other)
    tensors = {
        key: compare_tensors(a, b, key)
        for key in one.keys
        if key in other.keys and not key.endswith(".codes")
    }
    out: Json = {
        "name": name,
        "config": fields,
        "clusterings": _clusterings(one, other),
        "codes_equal": same_codes,
        "codes": changed,
        "embeddings": None,
        "tensors": {key: found for key, found in tensors.items() if not found["equal"]},
        "only_a": _only(one, other),
        "only_b": _only(other, one),
    }
    differs = fields or same_codes is False or out["tensors"] or out["only_a"] or out["only_b"]
    out["equal"] = not differs
    if one.record.embedding_dim == other.record.embedding_dim:
        out["embeddings"] = _distance(one, other, equal=out["equal"])
    return out


def _only(one: SavedTable, other: SavedTable) -> list[str]:
    """Tensors of one side, but for codes and what the record says: older formats differ there."""
    told = (".codes", ".num_helper_rows")
    return [key for key in one.keys if key not in other.keys and not key.endswith(told)]


def _clusterings(one: SavedTable, other: SavedTable) -> list[int] | None:
    own, others = one.clusterings, other.clusterings
    return None if own == others else [own, others]


def _codes(one: SavedTable, other: SavedTable) -> tuple[bool | None, list[float] | None]:
    """Whether codes are equal, and the share that changed by chunk."""
    own, others = one.record, other.record
    if not (isinstance(own, CCETableRecord) and isinstance(others, CCETableRecord)):
        return None, None
    # Chunks of other widths have nothing to match.
    if own.num_chunks != others.num_chunks:
        return False, None
    chunks, ids = range(own.num_chunks), min(own.num_embeddings, others.num_embeddings)
    counted = [Contingency(own.num_rows, others.num_rows) for _ in chunks]
    equal = own.num_embeddings == others.num_embeddings
    for first in range(0, ids, BLOCK):
        last = min(first + BLOCK, ids)
        a, b = one.codes(first, last), other.codes(first, last)
        equal &= torch.equal(a, b)
        for chunk in chunks:
            counted[chunk].add(a[:, chunk].numpy(), b[:, chunk].numpy())
    return equal, [one.changed() for one in counted]


def _distance(one: SavedTable, other: SavedTable, *, equal: bool) -> Json:
    """Between the embeddings of ids that both have."""
    count = min(one.record.num_embeddings, other.record.num_embeddings)
    exact = count <= SAMPLE or equal
    out: Json = {"relative_norm": 0.0, "ids": count, "exact": exact}
    if equal:
        return out
    ids = torch.arange(count)
    if not exact:
        # By a hash, so that any two checkpoints of a table are compared by the same ids.
        hash_ = hash_function(0, "", 0, role=_SAMPLE_ROLE)
        ids = torch.unique(hash_(torch.arange(SAMPLE), count))
    # float64, so that the difference is that of the numbers and not of their rounding.
    a, b = one.embeddings(ids), other.embeddings(ids)
    squares, of_a = float((a - b).square().sum()), float(a.square().sum())
    return out | {"relative_norm": relative(squares, of_a), "ids": len(ids)}
