"""Codes and hashes of some chunks of a table, as a module beside their codebooks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from cce_torchrec.codes.hashing import code_hash, hash_rows, helper_hash
from cce_torchrec.codes.storage import (
    hashed_codes,
    in_rows,
    in_whole_words,
    no_seen_ids,
    read_codes,
)
from cce_torchrec.config import CCEEmbeddingBagConfig
from cce_torchrec.table import Table


class ChunkCodes(nn.Module):
    """Codes and hashes of some chunks of one CCE table, of all its ids or a block of them.

    Buffers: `codes` [len(ids), len(chunks)] (absent where codes are not learned), `clusterings`,
    an int64 scalar from which the helper's hash follows, and with `track_seen` the bits `seen`.
    """

    def __init__(
        self,
        table: Table,
        chunks: Sequence[int],
        device: torch.device,
        ids: range | None = None,
    ) -> None:
        super().__init__()
        self.table = table
        config = table.compressed
        self.chunks = list(chunks)
        self.ids = range(config.num_embeddings) if ids is None else ids
        """Whose codes are here; the first is a multiple of 8."""
        self.codes: torch.Tensor | None
        self.clusterings: torch.Tensor
        codes = hashed_codes(config, chunks, device, ids) if config.learned_codes else None
        self.register_buffer("codes", codes)
        self.register_buffer("clusterings", torch.zeros((), dtype=torch.int64, device=device))
        self.seen: torch.Tensor | None
        bits = no_seen_ids(len(self.ids), device) if config.track_seen else None
        self.register_buffer("seen", bits)
        # On the host as well, where every lookup asks for it without waiting for a device.
        self._num_clusterings = 0
        self._hashes: dict[tuple[int, torch.device], torch.Tensor] = {}

    @property
    def stored(self) -> torch.Tensor:
        """The buffer `codes` of a table that is known to have learned codes."""
        assert self.codes is not None, f"table {self.config.name!r} has no learned codes"
        return self.codes

    @property
    def config(self) -> CCEEmbeddingBagConfig:
        """The table as it is configured now."""
        return self.table.compressed

    def sync_clusterings(self) -> None:
        """Reads `clusterings` back to the host; called after it was loaded or changed."""
        if self.clusterings.device.type != "meta":
            self._num_clusterings = int(self.clusterings)
        self.table.generation.advance()

    @property
    def num_clusterings(self) -> int:
        """Clusterings so far."""
        return self._num_clusterings

    def set_clusterings(self, rounds: int) -> None:
        """Sets the number of clusterings, and so the helper's hash."""
        self.clusterings.fill_(rounds)
        self._num_clusterings = rounds
        self.table.generation.advance()

    def set_codes(self, codes: torch.Tensor) -> None:
        """Takes `codes` [len(ids), len(chunks)] for its own."""
        self.codes = codes
        self.table.generation.advance()

    def reset_parameters(self) -> None:
        """Codes back to the initial hash."""
        if self.codes is not None:
            self.codes.copy_(hashed_codes(self.config, self.chunks, self.codes.device, self.ids))
        self.set_clusterings(0)
        if self.seen is not None:
            self.seen.zero_()

    def select(
        self, table: Table, chunks: list[int], device: torch.device, ids: range | None = None
    ) -> ChunkCodes:
        """A copy for `table` with `chunks` (and `ids`) only; the hash if these are on meta."""
        local = ChunkCodes(table, chunks, device, ids)
        rows = slice(local.ids.start, local.ids.stop)
        # On meta there is nothing to copy, and the new buffers have the initial hash already.
        if self.clusterings.device.type != "meta":
            local.set_clusterings(self.num_clusterings)
            if local.codes is not None and self.codes is not None:
                local.codes.copy_(self.codes[rows, chunks])
            if local.seen is not None and self.seen is not None:
                first = local.ids.start // 8
                local.seen.copy_(self.seen[first : first + len(local.seen)])
        return local

    def hashes(self, device: torch.device) -> torch.Tensor:
        """int64 [chunks, 5]: column, multiplier and addend of the main hash, of the helper hash."""
        key = (self._num_clusterings, device)
        if key not in self._hashes:
            config, rows = self.config, []
            for column, chunk in enumerate(self.chunks):
                main = code_hash(config.seed, config.name, chunk)
                helper = helper_hash(config.seed, config.name, chunk, self._num_clusterings)
                rows.append(
                    [column, main.multiplier, main.addend, helper.multiplier, helper.addend]
                )
            # The newest alone: codes are never looked up by the hashes of an earlier clustering.
            self._hashes = {key: torch.tensor(rows, device=device)}
        return self._hashes[key]

    def main_rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Main rows of `ids` [V], int64 [chunks, V]."""
        if self.codes is not None:
            return read_codes(self.codes, ids).t()
        hashes = self.hashes(ids.device)
        return hash_rows(ids, hashes[:, 1:2], hashes[:, 2:3], self.config.num_rows)

    def helper_rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Helper rows of `ids` [V], counted from 0, int64 [chunks, V]."""
        hashes = self.hashes(ids.device)
        return hash_rows(ids, hashes[:, 3:4], hashes[:, 4:5], self.config.helper_rows)

    def _apply(self, *args: Any, **kwargs: Any) -> ChunkCodes:
        # Buffers may move, and kernels are given their addresses once a generation.
        self.table.generation.advance()
        super()._apply(*args, **kwargs)
        if self.seen is not None:
            self.seen = in_whole_words(self.seen)
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # torch would convert the type, and int16 codes are unsigned: other rows would be read.
        found = state_dict.get(f"{prefix}codes")
        if self.codes is not None and found is not None and found.dtype != self.codes.dtype:
            raise ValueError(
                f"table {self.config.name!r}: the checkpoint has codes of {found.dtype}, the model "
                f"of {self.codes.dtype}, so their rows differ; configure num_rows (or "
                "config.finalized()) as it was saved"
            )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        # With assign=True buffers are the checkpoint's tensors.
        if self.codes is not None:
            self.codes = in_rows(self.codes)
        if self.seen is not None:
            self.seen = in_whole_words(self.seen)
        self.sync_clusterings()


def codes_of(codes: nn.ModuleDict, table: str) -> ChunkCodes | None:
    """The codes of `table` in `codes`, None for a plain table or one of another rank."""
    found = codes[table] if table in codes else None  # noqa: SIM401  # ModuleDict.get is untyped
    assert found is None or isinstance(found, ChunkCodes)
    return found


def local_codes(codes: nn.ModuleDict, table: str) -> ChunkCodes:
    """The codes of `table`, a CCE table of which this rank has some."""
    found = codes[table]
    assert isinstance(found, ChunkCodes)
    return found
