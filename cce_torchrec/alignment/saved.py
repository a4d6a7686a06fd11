"""Tables of checkpoints, and how those of two checkpoints are aligned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cce_torchrec.alignment.ids import Names
from cce_torchrec.alignment.kept_names import kept_names
from cce_torchrec.alignment.measures import SAMPLE
from cce_torchrec.alignment.tables import align
from cce_torchrec.checkpoint.folder import verify
from cce_torchrec.checkpoint.inspection import open_checkpoint
from cce_torchrec.checkpoint.manifest import CCETableRecord, Manifest, TableRecord
from cce_torchrec.checkpoint.saved_state import SavedState
from cce_torchrec.checkpoint.saved_table import SavedTable

Json = dict[str, Any]


class SavedVectors:
    """A table of a checkpoint for `align`, which reads codebooks once and plain rows by the block.

    Args:
        name: `collection.table`.
        state: the checkpoint.
    """

    def __init__(self, name: str, state: SavedState) -> None:
        table = SavedTable(name, state)
        self.num_embeddings, self.embedding_dim = (
            table.record.num_embeddings,
            table.record.embedding_dim,
        )
        self.embeddings = table.embeddings
        # Without learned codes (k = 1, or hashed ones) there are no clusters to agree about.
        if isinstance(table.record, CCETableRecord) and table.record.learned_codes:
            self.num_chunks, self.num_rows = table.record.num_chunks, table.record.num_rows
            self.codes = table.codes


def align_checkpoints(
    a: str | Path,
    b: str | Path,
    *,
    tables: Sequence[str] | None = None,
    counts: Mapping[str, torch.Tensor] | None = None,
    common: bool = False,
    names: Mapping[str, tuple[Names, Names]] | None = None,
    max_ids: int | None = None,
    k: int = 10,
    sample: int = SAMPLE,
) -> Json:
    """`align` of each table that two checkpoints have, read by the block without a model.

    Args:
        a: folder of a checkpoint, of a job whose latest one is meant, or of a run; local or a URI.
        b: the other one.
        tables: full names of those to compare, `collection.table`; default: all that both have.
        counts: by full name of a table, how often each of its ids is looked up; see `align`.
        common: see `align`; ids that two runs of the training program have numbered apart are
            compared by their keys.
        names: by full name of a table, the names of its ids in either checkpoint; see `align`.
        max_ids: see `align`.
        k: see `align`.
        sample: see `align`.

    Returns:
        a and b (paths); only_a and only_b, names of tables that one side lacks; tables: by name
        what `Alignment` holds, or `{"problem": why it cannot be}`.

    Raises:
        ValueError: one of them is no checkpoint that can be read, or is damaged; no table is in
            both, or not one of `tables`; or counts are of another table.
    """
    (path, one), (other_path, other) = open_checkpoint(a), open_checkpoint(b)
    # Before anything is read: a damaged file would give vectors that are merely odd.
    for place, manifest in ((path, one), (other_path, other)):
        verify(place, manifest.files)
    wanted = _wanted((path, one), (other_path, other), tables)
    for what, given in (("counts", counts), ("names", names)):
        for name in given or {}:
            if name not in wanted:
                raise ValueError(
                    f"{what} are given of {name!r}, and the tables compared are {wanted}"
                )
    states = SavedState(path, one), SavedState(other_path, other)
    found: Json = {}
    for name in wanted:
        try:
            own = None if counts is None else counts.get(name)
            x, y = (SavedVectors(name, state) for state in states)
            called = (names or {}).get(name) or _kept(
                name, (path, one.tables[name]), (other_path, other.tables[name]), common
            )
            aligned = align(
                x, y, counts=own, common=common, names=called, max_ids=max_ids, k=k, sample=sample
            )
            found[name] = asdict(aligned)
        except ValueError as error:  # of one table, such as one that was never trained
            found[name] = {"problem": str(error)}
    return {
        "a": str(path),
        "b": str(other_path),
        "only_a": [name for name in one.tables if name not in other.tables],
        "only_b": [name for name in other.tables if name not in one.tables],
        "tables": found,
    }


def _kept(
    name: str, a: tuple[Path, TableRecord], b: tuple[Path, TableRecord], common: bool
) -> tuple[np.ndarray, np.ndarray] | None:
    """Keys of the ids of both, where runs have numbered them apart.

    Raises:
        ValueError: they have, and `common` is not given.
    """
    own, other = (kept_names(path, record) for path, record in (a, b))
    if own is None or other is None or np.array_equal(own, other):
        return None
    if not common:
        both = len(np.intersect1d(own, other))
        raise ValueError(
            f"the runs have numbered the ids of {name} apart: {len(own):,} and {len(other):,} "
            f"keys, {both:,} of them the same; with common=True (--common) these are compared"
        )
    return own, other


def _wanted(
    a: tuple[Path, Manifest], b: tuple[Path, Manifest], tables: Sequence[str] | None
) -> list[str]:
    """Full names of the tables to compare: those that both have, or those of them in `tables`."""
    both = [name for name in a[1].tables if name in b[1].tables]
    if not both:
        raise ValueError(
            f"no table is in both: {a[0]} has {list(a[1].tables)}, {b[0]} {list(b[1].tables)}"
        )
    for name in tables or ():
        if name not in both:
            raise ValueError(f"{name!r} is not a table of both checkpoints; these are: {both}")
    return both if tables is None else list(tables)
