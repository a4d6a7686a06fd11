"""Codes and hashes of some chunks of a table, as a module beside their codebooks."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import nn

from cce_torchrec.codes.counts import count, no_counts
from cce_torchrec.codes.hashing import (
    bits_of_batch,
    code_hash,
    hash_rows,
    helper_hash,
    helper_hashes,
)
from cce_torchrec.codes.old_codes import take_old_codes
from cce_torchrec.codes.storage import (
    converted,
    empty_codes,
    hashed_codes,
    in_whole_words,
    mark_seen,
    no_seen_ids,
)
from cce_torchrec.config import CCEEmbeddingBagConfig
from cce_torchrec.packing import CodePacking
from cce_torchrec.table import Table
from cce_torchrec.torchrec_internals import buffers_of, version_of


class ChunkCodes(nn.Module):
    """Codes and hashes of some chunks of one CCE table, or none, of all its ids or a block of them.

    Buffers: `codes`, uint8, packed as packing.py says (absent where codes are not learned or have
    no bits), `clusterings`, an int64 scalar from which the helper's hash follows, with `track_seen`
    the bits `seen`, with `track_counts` the `counts` (counts.py) and the int64 scalar `batches`,
    how many were counted, and the int64 scalar `num_helper_rows`, which is saved and compared by
    helper_rows.py.
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
        self.packing = config.packing
        """Of the buffer `codes`."""
        self.codes: torch.Tensor | None
        self.clusterings: torch.Tensor
        codes = hashed_codes(config, chunks, device, ids) if config.code_bits else None
        self.register_buffer("codes", codes)
        self.register_buffer("clusterings", torch.zeros((), dtype=torch.int64, device=device))
        self.seen: torch.Tensor | None
        bits = no_seen_ids(len(self.ids), device) if config.track_seen else None
        self.register_buffer("seen", bits)
        self.counts: torch.Tensor | None
        self.batches: torch.Tensor | None
        counts = no_counts(len(self.ids), device) if config.track_counts else None
        self.register_buffer("counts", counts)
        batches = torch.zeros((), dtype=torch.int64, device=device) if config.track_counts else None
        self.register_buffer("batches", batches)
        # By which a load tells main from helper rows: codebooks have both in one tensor.
        helper = torch.tensor(config.helper_rows, dtype=torch.int64, device=device)
        self.register_buffer("num_helper_rows", helper)
        self._counted: tuple[torch.Tensor, int | None, int] | None = None
        self._hashes: dict[tuple[int, torch.device], torch.Tensor] = {}

    @property
    def stored(self) -> torch.Tensor:
        """The buffer `codes`, packed; where they have no bits, a tensor without columns."""
        if self.codes is None:
            device = self.clusterings.device
            return empty_codes(CodePacking(0), len(self.ids), len(self.chunks), device)
        return self.codes

    @property
    def unpacked(self) -> torch.Tensor:
        """Codes of all ids that are here as rows of main, int64 [len(ids), len(chunks)]."""
        if self.codes is None:
            return self.main_rows(torch.arange(self.ids.start, self.ids.stop)).t()
        return self.packing.unpack(self.codes, len(self.ids))

    @property
    def config(self) -> CCEEmbeddingBagConfig:
        """The table as it is configured now."""
        return self.table.compressed

    @property
    def num_clusterings(self) -> int:
        """Clusterings so far: the value of the buffer, whoever wrote it.

        The host waits for a GPU only where the buffer was written, or became another, since.
        """
        count = self.count
        if count.is_cpu:
            return int(count.item())
        if count.is_meta:  # which has the initial hash
            return 0
        # As `Written` does it, of a single buffer: every batch asks for each table.
        version, known = version_of(count), self._counted
        if known is None or known[0] is not count or version is None or known[1] != version:
            known = self._counted = count, version, int(count)
        return known[2]

    def set_clusterings(self, rounds: int) -> None:
        """Sets the number of clusterings, and so the helper's hash."""
        self.clusterings.fill_(rounds)

    def follow_table(self) -> None:
        """Has the number of helper rows and the bits of codes be as the table is configured now."""
        self.get_buffer("num_helper_rows").fill_(self.config.helper_rows)
        self.repack(self.config.packing)

    def repack(self, packing: CodePacking) -> None:
        """Packs the same codes in another way, into a buffer of their own."""
        if packing != self.packing:
            shape = len(self.ids), len(self.chunks)
            codes = converted(self.stored, self.packing, packing, *shape)
            self.set_codes(codes if packing.bits else None, packing)

    def set_codes(self, codes: torch.Tensor | None, packing: CodePacking) -> None:
        """Takes `codes`, packed by `packing`, for its own."""
        self.codes, self.packing = codes, packing

    def write(self, column: int, rows: torch.Tensor) -> None:
        """Gives all ids that are here the main rows `rows` [len(ids)] in chunk `chunks[column]`."""
        self.packing.write(self.stored, column, 0, rows)

    @property
    def count(self) -> torch.Tensor:
        """The buffer `clusterings`, which whoever writes codes writes too."""
        return buffers_of(self)["clusterings"]

    @property
    def read_by_lookups(self) -> list[torch.Tensor]:
        """The buffers from which rows follow; a write to any of them may change rows."""
        own = buffers_of(self)
        return [tensor for name in ("clusterings", "codes") if (tensor := own[name]) is not None]

    @property
    def described(self) -> Hashable:
        """Changes where what kernels are told about the table does: addresses and hashes."""
        own = buffers_of(self)
        codes, seen, counts = own["codes"], own["seen"], own["counts"]
        return (
            None if codes is None else (codes.data_ptr(), codes.shape, codes.stride()),
            self.packing,
            None if seen is None or not self.training else seen.data_ptr(),
            None if counts is None or not self.counting else counts.data_ptr(),
            self.num_clusterings,
        )

    def reset_parameters(self) -> None:
        """Codes back to the initial hash."""
        self.packing = self.config.packing
        if self.codes is not None:
            self.codes.copy_(hashed_codes(self.config, self.chunks, self.codes.device, self.ids))
        self.set_clusterings(0)
        self.follow_table()
        for noted in (self.seen, self.counts, self.batches):
            if noted is not None:
                noted.zero_()

    def begin_batch(self) -> None:
        """A batch of training is looked up next; every rank calls it, whatever it has of it."""
        batches = buffers_of(self)["batches"]
        if batches is not None and self.counting:
            batches.add_(1)

    @property
    def counting(self) -> bool:
        """Whether lookups in training count ids; not once the table is finalized."""
        return self.training and self.counts is not None and self.config.helper_rows > 0

    def mark(self, ids: torch.Tensor) -> None:
        """Notes that `ids`, int64 counted from the first one here, are seen in training."""
        if self.training and self.seen is not None:
            mark_seen(self.seen, ids)

    def note(self, ids: torch.Tensor) -> None:
        """Notes that `ids` are looked up in training: that they are seen, and how often."""
        self.mark(ids)
        if self.counting and self.counts is not None and self.batches is not None:
            config = self.config
            bits = bits_of_batch(ids + self.ids.start, config.seed, config.name, self.batches)
            count(self.counts, ids, bits)

    @property
    def notes(self) -> bool:
        """Whether lookups in training note anything of their ids."""
        return self.counting or (self.training and self.seen is not None)

    def select(
        self, table: Table, chunks: list[int], device: torch.device, ids: range | None = None
    ) -> ChunkCodes:
        """A copy for `table` with `chunks` (and `ids`) only; the hash if these are on meta."""
        local = ChunkCodes(table, chunks, device, ids)
        # On meta there is nothing to copy, and the new buffers have the initial hash already.
        if self.clusterings.device.type != "meta":
            local.set_clusterings(self.num_clusterings)
            if local.codes is not None and self.codes is not None:
                first = local.ids.start // self.packing.group
                rows = self.codes[first : first + len(local.codes)]
                local.codes.copy_(rows[:, self.packing.bytes_of(chunks)])
            for name, ids_per_byte in self.config.notes.items():
                own, first = local.get_buffer(name), local.ids.start // ids_per_byte
                own.copy_(self.get_buffer(name)[first : first + len(own)])
            if local.batches is not None and self.batches is not None:
                local.batches.copy_(self.batches)
        return local

    def hashes(self, device: torch.device) -> torch.Tensor:
        """int64 [chunks, 5]: column, multiplier and addend of the main hash, of the helper hash."""
        # A graph reads the buffer, as it is called for other values of it than it was made with.
        if torch.compiler.is_compiling():
            main = torch.tensor(self._main_hashes(), device=device)
            config = self.config
            helpers = helper_hashes(config.seed, config.name, self.chunks, self.clusterings)
            return torch.cat([main, helpers.to(device)], dim=1)
        key = (self.num_clusterings, device)
        if key not in self._hashes:
            config, rows = self.config, []
            for own, chunk in zip(self._main_hashes(), self.chunks, strict=True):
                helper = helper_hash(config.seed, config.name, chunk, key[0])
                rows.append([*own, helper.multiplier, helper.addend])
            # The newest alone: codes are never looked up by the hashes of an earlier clustering.
            self._hashes = {key: torch.tensor(rows, device=device)}
        return self._hashes[key]

    def _main_hashes(self) -> list[list[int]]:
        """Column, multiplier and addend of each chunk's."""
        config, rows = self.config, []
        for column, chunk in enumerate(self.chunks):
            main = code_hash(config.seed, config.name, chunk)
            rows.append([column, main.multiplier, main.addend])
        return rows

    def main_rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Main rows of `ids` [V], int64 [chunks, V]."""
        if self.codes is not None:
            return self.packing.read_words(self.codes, ids, len(self.chunks)).t()
        hashes = self.hashes(ids.device)
        return hash_rows(ids, hashes[:, 1:2], hashes[:, 2:3], self.config.num_rows)

    def helper_rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Helper rows of `ids` [V], counted from 0, int64 [chunks, V]."""
        hashes = self.hashes(ids.device)
        return hash_rows(ids, hashes[:, 3:4], hashes[:, 4:5], self.config.helper_rows)

    def _apply(self, *args: Any, **kwargs: Any) -> ChunkCodes:
        super()._apply(*args, **kwargs)
        self._align()
        return self

    def _align(self) -> None:
        if self.codes is not None:
            self.codes = in_whole_words(self.codes)
        if self.seen is not None:
            self.seen = in_whole_words(self.seen)
        if self.counts is not None:
            self.counts = in_whole_words(self.counts)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        shape = len(self.ids), len(self.chunks)
        take_old_codes(self.config, state_dict, f"{prefix}codes", *shape)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._align()  # with assign=True buffers are the checkpoint's tensors


def codes_of(codes: nn.ModuleDict, table: str) -> ChunkCodes | None:
    """The codes of `table` in `codes`, None for a plain table."""
    found = codes[table] if table in codes else None  # noqa: SIM401  # ModuleDict.get is untyped
    assert found is None or isinstance(found, ChunkCodes)
    return found


def local_codes(codes: nn.ModuleDict, table: str) -> ChunkCodes:
    """The codes of `table`, a CCE table."""
    found = codes[table]
    assert isinstance(found, ChunkCodes)
    return found
