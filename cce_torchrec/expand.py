"""Expansion: a KeyedJaggedTensor of ids becomes one of codebook rows.

Logical slots (table, feature) come in; physical features (table chunk, feature) go out. A block
is one table with the chunks that are looked up together: its ids are contiguous in the input and
its rows are written straight into their place in the output, [chunks, ids, rows per id].
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from torch import nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from cce_torchrec.codes import hashed_codes, mark_seen, widen
from cce_torchrec.config import CCEEmbeddingBagConfig
from cce_torchrec.hashing import code_hash, hash_ids, helper_hash

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Slot:
    """One feature of one table, as the user configured it."""

    table: str
    feature: str


def physical_table(table: str, chunk: int) -> str:
    """Name of the TorchRec table that holds one chunk of a CCE table."""
    return f"{table}#{chunk}"


def physical_feature(table: str, feature: str, chunk: int | None) -> str:
    """Feature name of one chunk (None: of a plain table); unambiguous, as tables have no '#'."""
    return f"{table}#{'' if chunk is None else chunk}.{feature}"


class ChunkCodes(nn.Module):
    """Codes and hashes of some chunks of one CCE table, beside their codebooks.

    Buffers: `codes` [N, len(chunks)] (absent where codes are not learned), `clusterings`, an
    int64 scalar from which the helper's hash follows, and with `track_seen` the bits `seen`.
    """

    def __init__(
        self, config: CCEEmbeddingBagConfig, chunks: Sequence[int], device: torch.device
    ) -> None:
        super().__init__()
        self.config = config
        self.chunks = list(chunks)
        self.codes: torch.Tensor | None
        self.clusterings: torch.Tensor
        codes = hashed_codes(config, chunks, device) if config.learned_codes else None
        self.register_buffer("codes", codes)
        self.register_buffer("clusterings", torch.zeros((), dtype=torch.int64, device=device))
        self.seen: torch.Tensor | None
        bits = torch.zeros(config.seen_bytes, dtype=torch.uint8, device=device)
        self.register_buffer("seen", bits if config.track_seen else None)
        self._rounds = 0

    def sync_rounds(self) -> None:
        """Reads `clusterings` back to the host; called after it was loaded or changed."""
        if self.clusterings.device.type != "meta":
            self._rounds = int(self.clusterings)

    @property
    def rounds(self) -> int:
        """Clusterings so far."""
        return self._rounds

    def set_rounds(self, rounds: int) -> None:
        """Sets the number of clusterings, and so the helper's hash."""
        self.clusterings.fill_(rounds)
        self._rounds = rounds

    def reset_parameters(self) -> None:
        """Codes back to the initial hash."""
        if self.codes is not None:
            self.codes.copy_(hashed_codes(self.config, self.chunks, self.codes.device))
        self.set_rounds(0)
        if self.seen is not None:
            self.seen.zero_()

    def select(self, chunks: list[int], device: torch.device) -> ChunkCodes:
        """A copy with `chunks` only, on `device`; codes are the hash if these are on meta."""
        local = ChunkCodes(self.config, chunks, device)
        if self.clusterings.device.type != "meta":
            local.set_rounds(self.rounds)
            if local.codes is not None and self.codes is not None:
                local.codes.copy_(self.codes[:, chunks])
            if local.seen is not None and self.seen is not None:
                local.seen.copy_(self.seen)
        return local

    def main_rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Main rows of `ids` [V], int64 [chunks, V]."""
        config = self.config
        if self.seen is not None and self.training:
            mark_seen(self.seen, ids.long())
        if self.codes is not None:
            return widen(self.codes.index_select(0, ids)).t()
        hashes = [code_hash(config.seed, config.name, chunk) for chunk in self.chunks]
        return torch.stack([h(ids, config.num_rows) for h in hashes])

    def helper_rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Helper rows of `ids` [V], counted from 0, int64 [chunks, V]."""
        config = self.config
        hashes = [
            helper_hash(config.seed, config.name, chunk, self._rounds) for chunk in self.chunks
        ]
        return torch.stack([h(ids, config.helper_rows) for h in hashes])

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        super()._load_from_state_dict(*args, **kwargs)  # type: ignore[arg-type]  # torch's signature
        self.sync_rounds()


def codes_of(codes: nn.ModuleDict, table: str) -> ChunkCodes | None:
    """The codes of `table` in `codes`, None for a plain table or one of another rank."""
    found = codes[table] if table in codes else None  # noqa: SIM401  # ModuleDict.get is untyped
    assert found is None or isinstance(found, ChunkCodes)
    return found


class BoundsCheck:
    """Guarantee 5: ids outside [0, num_embeddings), found before expansion, in a copy."""

    def __init__(self, mode: BoundsCheckMode) -> None:
        self.mode = mode
        self.num_invalid = 0
        """Ids out of bounds seen so far in WARNING mode."""
        self._warned: set[str] = set()

    def __call__(self, slot_names: str, ids: torch.Tensor, num_embeddings: int) -> torch.Tensor:
        """`ids` with those out of bounds read as 0.

        Raises:
            ValueError: in FATAL mode, naming table, feature and the first bad value.
        """
        if self.mode == BoundsCheckMode.NONE or ids.numel() == 0:
            return ids
        invalid = (ids < 0) | (ids >= num_embeddings)
        if self.mode == BoundsCheckMode.IGNORE:
            return ids.masked_fill(invalid, 0)
        count = int(invalid.sum())
        if count == 0:
            return ids
        message = (
            f"{slot_names}: id {int(ids[invalid][0])} is outside [0, {num_embeddings}) "
            f"({count} such ids in this batch)"
        )
        if self.mode == BoundsCheckMode.FATAL:
            raise ValueError(f"{message}; raise num_embeddings or map the ids into range")
        self.num_invalid += count
        if slot_names not in self._warned:
            self._warned.add(slot_names)
            logger.warning("%s; reading id 0 instead, further ones are only counted", message)
        return ids.masked_fill(invalid, 0)


@dataclass
class Block:
    """Consecutive physical features of one table: `chunks` of a CCE table, or a plain table."""

    config: EmbeddingBagConfig
    slots: list[int]
    """Positions of its features in the logical input."""
    codes: ChunkCodes | None
    columns: list[int]
    """Which of the chunks of `codes` are expanded here."""

    @property
    def copies(self) -> int:
        """How often the ids of a slot appear in the output as physical features."""
        return len(self.columns) if self.codes is not None else 1

    @property
    def rows_per_id(self) -> int:
        """Rows per id and chunk."""
        return self.config.rows_per_id if isinstance(self.config, CCEEmbeddingBagConfig) else 1

    def hashed(self, ids: torch.Tensor) -> torch.Tensor:
        """`ids`, or what a table with `hash_ids` makes of them."""
        config = self.config
        if not (isinstance(config, CCEEmbeddingBagConfig) and config.hash_ids):
            return ids
        return hash_ids(ids, config.seed, config.name, config.num_embeddings)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Codebook rows of `ids` [V], int64 [chunks, V, rows per id]."""
        if self.codes is None:
            return ids.view(1, -1, 1)
        whole = len(self.columns) == len(self.codes.chunks)
        main = self.codes.main_rows(ids)
        parts = [main if whole else main[self.columns]]
        if self.rows_per_id == 2:
            helper = self.codes.helper_rows(ids)
            parts.append((helper if whole else helper[self.columns]) + self.codes.config.num_rows)
        return torch.stack(parts, dim=-1)


class Expansion:
    """Turns a KJT over logical slots into the KJT over physical features of one lookup."""

    def __init__(self, blocks: list[Block], slots: list[Slot], keys: list[str]) -> None:
        self._blocks = blocks
        self._slots = slots
        self._keys = keys
        self._identity = all(b.codes is None for b in blocks) and [
            s for b in blocks for s in b.slots
        ] == list(range(len(slots)))

    def __call__(
        self,
        features: KeyedJaggedTensor,
        check: BoundsCheck,
        inverse_indices: tuple[list[str], torch.Tensor] | None = None,
    ) -> KeyedJaggedTensor:
        """Codebook rows of `features`, whose keys are the logical slots in order.

        Nothing of `features` is written to. With a batch size per feature, `inverse_indices` of
        logical features become those of the physical ones.
        """
        per_key, strides = features.length_per_key(), features.stride_per_key()
        starts = list(itertools.accumulate(per_key, initial=0))
        bag_starts = list(itertools.accumulate(strides, initial=0))
        ids, weights, lengths = features.values(), features.weights_or_none(), features.lengths()
        out_values, out_lengths, out_weights = [], [], []
        out_slots: list[int] = []
        out_per_key: list[int] = []
        for block in self._blocks:
            pieces = [(starts[s], starts[s + 1]) for s in block.slots]
            own = _gather(ids, pieces)
            who = ", ".join(f"feature {self._slots[s].feature!r}" for s in block.slots)
            own = block.hashed(own)
            own = check(f"table {block.config.name!r}, {who}", own, block.config.num_embeddings)
            out_values.append(block.rows(own).to(ids.dtype).reshape(-1))
            r, c = block.rows_per_id, block.copies
            bags = _gather(lengths, [(bag_starts[s], bag_starts[s + 1]) for s in block.slots])
            out_lengths.append((bags * r).repeat(c))
            out_slots += block.slots * c
            out_per_key += [per_key[s] * r for s in block.slots] * c
            if weights is not None:
                out_weights.append(_gather(weights, pieces).repeat_interleave(r).repeat(c))
        return KeyedJaggedTensor(
            keys=self._keys,
            values=torch.cat(out_values) if out_values else ids.new_empty(0),
            weights=(torch.cat(out_weights) if out_weights else weights)
            if weights is not None
            else None,
            lengths=torch.cat(out_lengths) if out_lengths else lengths.new_empty(0),
            length_per_key=out_per_key,
            **self._batch_sizes(features, out_slots, inverse_indices),
        )

    def _batch_sizes(
        self,
        features: KeyedJaggedTensor,
        slots: list[int],
        inverse: tuple[list[str], torch.Tensor] | None,
    ) -> dict[str, Any]:
        """Batch size of the expanded KJT: one, or by physical feature where it varies."""
        if not features.variable_stride_per_key():
            return {"stride": features.stride()}
        per_rank = features.stride_per_key_per_rank()
        sizes: dict[str, Any] = {"stride_per_key_per_rank": [list(per_rank[s]) for s in slots]}
        if inverse is not None:
            order = [inverse[0].index(self._slots[s].feature) for s in slots]
            sizes["inverse_indices"] = (self._keys, inverse[1][order])
        return sizes


def _gather(values: torch.Tensor, pieces: list[tuple[int, int]]) -> torch.Tensor:
    """The pieces of `values`, one tensor; a view where they follow one another."""
    follows = all(a[1] == b[0] for a, b in itertools.pairwise(pieces))
    if follows:
        return values[pieces[0][0] : pieces[-1][1]]
    return torch.cat([values[start:end] for start, end in pieces])
