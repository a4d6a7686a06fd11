"""One table of a lookup: how its ids become rows, in torch, compiled or by a GPU's kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from cce_torchrec.codes.chunk_codes import ChunkCodes
from cce_torchrec.codes.hashing import count_state, hash_ids, raw_id_key
from cce_torchrec.config import is_cce
from cce_torchrec.lookup import device, native
from cce_torchrec.lookup.bounds import BoundsCheck
from cce_torchrec.lookup.noting import note
from cce_torchrec.table import Table


@dataclass
class TableLookup:
    """Consecutive physical features of one table: `chunks` of a CCE table, or a plain table."""

    table: Table
    slots: list[int]
    """Positions of its features in the logical input."""
    codes: ChunkCodes | None
    columns: list[int]
    """Which of the chunks of `codes` are expanded here."""

    @property
    def config(self) -> EmbeddingBagConfig:
        """The table as it is configured now."""
        return self.table.config

    @property
    def copies(self) -> int:
        """How often the ids of a slot appear in the output as physical features."""
        return len(self.columns) if self.codes is not None else 1

    @property
    def rows_per_id(self) -> int:
        """Rows per id and chunk."""
        return self.table.rows_per_id

    @property
    def hashes_ids(self) -> bool:
        """Whether ids are raw, to be hashed into [0, num_embeddings)."""
        # Into the ranges of features they are before (id_ranges.py).
        return is_cce(self.config) and self.config.hash_ids and not self.config.id_ranges

    def hashed(self, ids: torch.Tensor) -> torch.Tensor:
        """`ids`, or what a table with `hash_ids` makes of them."""
        if not self.hashes_ids:
            return ids
        config = self.config
        assert is_cce(config)
        return hash_ids(ids, raw_id_key(config.seed, config.name), config.num_embeddings)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Codebook rows of `ids` [V], all in bounds, int64 [chunks, V, rows per id]."""
        if self.codes is None:
            return ids.view(1, -1, 1)
        whole = len(self.columns) == len(self.codes.chunks)
        main = self.codes.main_rows(ids)
        parts = [main if whole else main[self.columns]]
        if self.rows_per_id == 2:
            helper = self.codes.helper_rows(ids)
            parts.append((helper if whole else helper[self.columns]) + self.codes.config.num_rows)
        return torch.stack(parts, dim=-1)

    def marked(self, name: str, ids: torch.Tensor, check: BoundsCheck) -> torch.Tensor:
        """`ids`, noted (and checked before) where the table keeps track of them."""
        codes = self.codes
        if codes is None or not codes.notes:
            return ids
        # First, as an id out of bounds has no bit of its own.
        ids = check(name, ids, self.config.num_embeddings)
        note(codes, ids.long())
        return ids

    def job(self, ids: torch.Tensor, out: torch.Tensor) -> native.Job:
        """The compiled expansion of `ids` [V] into `out`, int64 [chunks * V * rows per id]."""
        codes = self.codes
        if codes is None:
            return native.Job(ids, self.config.num_embeddings, out)
        hashes = codes.hashes(ids.device)
        if len(self.columns) < len(codes.chunks):
            hashes = hashes[self.columns]
        return native.Job(
            ids,
            self.config.num_embeddings,
            out,
            hashes,
            codes.codes,
            codes.packing.bits,
            codes.config.num_rows,
            codes.config.helper_rows,
        )

    def on_device(self) -> device.Table:
        """The table as the Triton kernels read it."""
        codes, num_embeddings = self.codes, self.config.num_embeddings
        if codes is None:
            return device.Table(
                num_embeddings=num_embeddings, num_features=len(self.slots), plain=True
            )
        # Hashes are asked for on the CPU: to read them back from a GPU would wait for it.
        config, hashes = codes.config, codes.hashes(torch.device("cpu")).tolist()
        return device.Table(
            num_embeddings=num_embeddings,
            num_features=len(self.slots),
            codes=codes.codes,
            code_bits=codes.packing.bits,
            num_rows=config.num_rows,
            helper_rows=config.helper_rows,
            chunks=tuple(tuple(hashes[column]) for column in self.columns),
            raw_id_key=raw_id_key(config.seed, config.name) if self.hashes_ids else None,
            seen=codes.seen if codes.training else None,
            counts=codes.counts if codes.counting else None,
            batches=codes.batches,
            count_state=count_state(config.seed, config.name),
        )
