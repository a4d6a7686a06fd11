"""One table of a checkpoint: codes, rows and embeddings of ids, without a model."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch

from cce_torchrec.checkpoint.health_parts import Role, keys_of, packing_of, role_of
from cce_torchrec.checkpoint.manifest import CCETableRecord
from cce_torchrec.checkpoint.saved_state import SavedState
from cce_torchrec.chunk_order import first_chunks, rotated
from cce_torchrec.codes.hashing import code_hash, helper_hash, mix
from cce_torchrec.codes.whole_codes import rows_of

BLOCK = 1 << 20
"""Ids whose codes are read at once; a multiple of 8."""


class SavedTable:
    """A table of a checkpoint, by its full name.

    Args:
        name: `collection.table`.
        state: the checkpoint.
    """

    def __init__(self, name: str, state: SavedState) -> None:
        self.record = state.manifest.tables[name]
        self._state = state
        self.keys = keys_of(state.tensors, {name: self.record})[name]
        """Of its tensors."""
        self._codes = next((k for k in self.keys if k.endswith(".codes")), None)
        roles = {key: role_of(key) for key in self.keys}
        self._weights = {role: key for key, role in roles.items() if role and not role.state}
        self._codebooks: dict[int, torch.Tensor] = {}

    @property
    def cce(self) -> CCETableRecord:
        """The record of a table that is known to be compressed."""
        assert isinstance(self.record, CCETableRecord)
        return self.record

    @cached_property
    def clusterings(self) -> int:
        """How often it was clustered."""
        name = f"codes.{self.record.name}.clusterings"
        key = next((key for key in self.keys if key.endswith(name)), None)
        return 0 if key is None else int(self._state.whole(key))

    def codes(self, first: int, last: int) -> torch.Tensor:
        """Main rows of ids [first, last), int64 [ids, chunks]; `first` is a multiple of 8."""
        table, manifest = self.cce, self._state.manifest
        if self._codes is None:
            mixed = mix(torch.arange(first, last))
            hashes = [code_hash(table.seed, table.name, j) for j in range(table.num_chunks)]
            return torch.stack([one.of_mixed(mixed, table.num_rows) for one in hashes], 1)
        if manifest.has_whole_codes:
            return rows_of(self._state.rows(self._codes, first, last))
        # Whole groups of ids are read, as several share a byte.
        packing = packing_of(table)
        rows = self._state.rows(self._codes, first // packing.group, packing.rows(last))
        return packing.unpack(rows, last - first)

    def embeddings(self, ids: torch.Tensor) -> torch.Tensor:
        """Of `ids` [n], which ascend: float64 [n, embedding_dim]."""
        if not isinstance(self.record, CCETableRecord):
            key = self._weights[Role(None, "")]
            first, last = (int(ids[0]), int(ids[-1]) + 1) if len(ids) else (0, 0)
            if last - first == len(ids):  # consecutive ones, of which no more is read
                return self._state.rows(key, first, last).double()
            return torch.cat([
                block[own - first].double()
                for first, block in self._state.blocks(key)
                if len(own := _between(ids, first, first + len(block)))
            ])  # fmt: skip
        parts = [self.codes(first, last)[own - first] for own, first, last in self._wanted(ids)]
        codes, mixed, table = torch.cat(parts), mix(ids), self.cce
        out = []
        for chunk in range(table.num_chunks):
            weight = self._codebook(chunk)
            # Main and helper are in one tensor, main first.
            rows = weight[codes[:, chunk]].double()
            if table.num_helper_rows:
                hash_ = helper_hash(table.seed, table.name, chunk, self.clusterings)
                rows += weight[table.num_rows + hash_.of_mixed(mixed, table.num_helper_rows)]
            out.append(rows)
        vectors = torch.cat(out, dim=1)
        if not table.rotate_chunks:
            return vectors
        starts = [start for start, _ in (table.id_ranges or {}).values()]
        return rotated(vectors, first_chunks(starts, ids, table.num_chunks), table.num_chunks)

    def _codebook(self, chunk: int) -> torch.Tensor:
        """Rows of a chunk, which are few: they are read once."""
        if chunk not in self._codebooks:
            self._codebooks[chunk] = self._state.whole(self._weights[Role(chunk, "")])
        return self._codebooks[chunk]

    def _wanted(self, ids: torch.Tensor) -> Iterator[tuple[torch.Tensor, int, int]]:
        """Those of `ids` in each block of ids that has some, and between which codes they are."""
        for first in range(0, self.record.num_embeddings, BLOCK):
            own = _between(ids, first, first + BLOCK)
            if len(own):
                yield own, int(own[0]) // 8 * 8, int(own[-1]) + 1


def _between(ids: torch.Tensor, first: int, last: int) -> torch.Tensor:
    """Those of ascending `ids` in [first, last)."""
    # They ascend, so no block looks at all of them.
    ends = torch.searchsorted(ids, torch.tensor([first, last]))
    return ids[int(ends[0]) : int(ends[1])]
