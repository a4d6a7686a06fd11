"""Packed codes in a sharded module's state dict: one ShardedTensor per logical table.

Its shards are columns, one per run of neighbouring chunks that a rank owns, or under ROW_WISE
blocks of ids, so that torch.distributed.checkpoint saves them at one world size and plan and loads
them at another, or as the plain tensor of the unsharded module. Large ones are cut once more by
ids, because whole shards are read where a part is wanted. What training notes of the ids of a
ROW_WISE table (bits of seen ids, counts) is sharded like its codes, uncut.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from cce_torchrec.codes.chunk_codes import ChunkCodes, local_codes
from cce_torchrec.codes.helper_rows import save_helper_rows
from cce_torchrec.config import CCEEmbeddingBagConfig
from cce_torchrec.distributed.id_partition import IdPartition
from cce_torchrec.distributed.table_placement import TablePlacement
from cce_torchrec.modules.foreign_state import refuse_foreign_state
from cce_torchrec.modules.old_names import take_old_names
from cce_torchrec.packing import GROUP, CodePacking
from cce_torchrec.table import Table, codes_key
from cce_torchrec.torchrec_internals import (
    Shard,
    ShardedTensor,
    ShardedTensorMetadata,
    ShardMetadata,
    TensorProperties,
    sharded_tensor,
    version_of,
)

SHARD_BYTES = 1 << 26
"""Most that the codes of a shard take, or those of a single id."""


@dataclass(frozen=True)
class Part:
    """Codes of neighbouring ids and chunks that one rank holds."""

    owner: int
    ids: range
    chunks: range

    def offsets(self, packing: CodePacking) -> list[int]:
        """Of the first of them in the packed codes of the table."""
        return [self.ids.start // packing.group, self.chunks.start * packing.width]

    def sizes(self, packing: CodePacking) -> list[int]:
        """Of them, packed."""
        return packing.shape(len(self.ids), len(self.chunks))

    def cut(self, packing: CodePacking) -> list[Part]:
        """The same in blocks of ids, as shards have them."""
        # A rank of another plan reads whole shards, of which it may want a few columns.
        size = max(1, SHARD_BYTES // packing.nbytes(GROUP, len(self.chunks))) * GROUP
        cuts = range(0, len(self.ids), size)
        return [Part(self.owner, self.ids[at : at + size], self.chunks) for at in cuts]

    def view(self, local: ChunkCodes) -> torch.Tensor:
        """These codes in the buffer `local` of the rank that has them, packed; a view."""
        packing, column = local.packing, local.chunks.index(self.chunks.start)
        (rows, width), row = self.sizes(packing), self.ids.start - local.ids.start
        first, left = row // packing.group, column * packing.width
        return local.stored[first : first + rows, left : left + width]


def _parts(
    config: CCEEmbeddingBagConfig, owners: list[int], partition: IdPartition | None
) -> list[Part]:
    """The shards of a table's codes."""
    if partition is not None:
        chunks = range(config.num_chunks)
        by_rank = [Part(rank, partition.ids(rank), chunks) for rank in partition.ranks]
        # A small table has fewer blocks than there are ranks, and no shard is empty.
        return [part for part in by_rank if part.ids]
    out, first = [], 0
    for owner, run in itertools.groupby(owners):
        count = len(list(run))
        out.append(Part(owner, range(config.num_embeddings), range(first, first + count)))
        first += count
    return out


class _Copy:
    """Codes of this rank in a state dict, where they had to be copied out of its buffer."""

    def __init__(self, table: str, part: Part, codes: torch.Tensor) -> None:
        self.table, self._part = table, part
        # Until codes are read next, as a state dict may be written to and given up before.
        self._kept: torch.Tensor | None = codes
        self._codes, self._version = weakref.ref(codes), version_of(codes)

    def take_written(self, local: ChunkCodes) -> None:
        """Copies them back into the buffer `local` if they were written."""
        self._kept, codes = None, self._codes()
        if codes is None or version_of(codes) == self._version:
            return
        self._version, view = version_of(codes), self._part.view(local)
        if view.shape == codes.shape:  # codes may be wider since, by finalize
            with torch.no_grad():
                view.copy_(codes)

    def is_held(self) -> bool:
        """Whether anyone can still write to them."""
        return self._codes() is not None


class CodesState:
    """State-dict hooks of one sharded collection."""

    def __init__(
        self,
        codes: nn.ModuleDict,
        tables: Sequence[Table],
        placement: TablePlacement,
        rank: int,
        device: torch.device,
        group: dist.ProcessGroup | None,
    ) -> None:
        self._codes, self._tables, self._rank = codes, tables, rank
        self._owners, self._partitions = placement.chunk_owners, placement.id_partitions
        self._copies: list[_Copy] = []
        self._device, self._group = torch.empty(0, device=device).device, group  # with its index

    @property
    def _compressed(self) -> list[CCEEmbeddingBagConfig]:
        return [table.cce for table in self._tables if table.cce is not None]

    def _sharded_tables(self) -> list[CCEEmbeddingBagConfig]:
        """Those whose state is sharded; that of a data-parallel one stays tensors."""
        return [config for config in self._compressed if config.name in self._owners]

    def take_written(self) -> None:
        """Writes into the buffers what was written into copies of them in a state dict.

        As torch.distributed.checkpoint loads into the tensors of a state dict. To be called before
        codes are read.
        """
        for copy in self._copies:
            copy.take_written(local_codes(self._codes, copy.table))
        if self._copies:
            self._copies = [copy for copy in self._copies if copy.is_held()]

    def save(
        self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]
    ) -> None:
        """Replaces this rank's part by the table's ShardedTensor, on every rank."""
        self.take_written()
        for config in self._sharded_tables():
            if config.code_bits:
                state[codes_key(prefix, config.name)] = self._sharded(config)
            own = local_codes(self._codes, config.name)
            # A plain tensor would be taken for a copy of what the owners have.
            if config.name in self._partitions or not own.chunks:
                for name, ids_per_byte in config.notes.items():
                    key = _note_key(prefix, config.name, name)
                    state[key] = self._sharded_notes(config, name, ids_per_byte)
        save_helper_rows(self._compressed, state, prefix)

    def load(self, module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Replaces a table's ShardedTensor by this rank's part, where it has any.

        Raises:
            ValueError: codes of another table size or number of chunks, naming both, or of a
                table whose codes are not learned here, or other main and helper rows; and
                `assign=True`.
        """
        self.take_written()  # now, as later it would undo what is loaded
        # `rest` begins with torch's local_metadata.
        # Taken out: torch leaves it in the caller's state, and would assign in the next load too.
        if rest[0].pop("assign_to_params_buffers", False):
            # The parameters would be others, and the lookups go on with FBGEMM's own weights.
            raise ValueError(
                f"tables {[table.name for table in self._tables]}: sharded lookups do not take "
                "weights from load_state_dict(assign=True); leave assign out, and they are copied"
            )
        take_old_names([table.config for table in self._tables], state, prefix)
        refuse_foreign_state(self._compressed, state, prefix)
        for config in self._sharded_tables():
            key, local = codes_key(prefix, config.name), local_codes(self._codes, config.name)
            parts = self._own_parts(config)
            if key in state:
                # Without parts it has the codes of no id.
                value = state[key]
                state[key] = _taken(config, value, parts, local) if parts else local.stored
            for name, ids_per_byte in config.notes.items():
                key, own = _note_key(prefix, config.name, name), local.get_buffer(name)
                if key in state and config.name in self._partitions:
                    first = local.ids.start // ids_per_byte
                    state[key] = _own_notes(state[key], own, first)
                elif key in state and not parts:
                    state[key] = own

    def _own_parts(self, config: CCEEmbeddingBagConfig) -> list[Part]:
        return [part for part in self._parts(config) if part.owner == self._rank]

    def _parts(self, config: CCEEmbeddingBagConfig) -> list[Part]:
        return _parts(config, self._owners[config.name], self._partitions.get(config.name))

    def _sharded(self, config: CCEEmbeddingBagConfig) -> ShardedTensor:
        shards, local = [], []
        packing = config.packing
        for part in (p for whole in self._parts(config) for p in whole.cut(packing)):
            shard = self._shard(part, part.offsets(packing), part.sizes(packing))
            shards.append(shard)
            if part.owner == self._rank:
                # Rows of the buffer are their own shard; columns are copied, as shards must be
                # contiguous.
                codes = part.view(local_codes(self._codes, config.name))
                own = codes.contiguous()
                if own is not codes:
                    self._copies.append(_Copy(config.name, part, own))
                local.append(Shard(own, shard))
        size = packing.shape(config.num_embeddings, config.num_chunks)
        return self._tensor(local, shards, size, torch.uint8)

    def _sharded_notes(
        self, config: CCEEmbeddingBagConfig, name: str, ids_per_byte: int
    ) -> ShardedTensor:
        """The notes of all ids: of each block its own bytes, of the last one the spare as well.

        Where other ranks have the chunks, all notes are the first one's.
        """
        size = config.num_embeddings // ids_per_byte + 2
        shards, local = [], []
        parts = self._parts(config) if config.name in self._partitions else self._parts(config)[:1]
        for part in parts:
            first = part.ids.start // ids_per_byte
            last = part.ids.stop // ids_per_byte if part is not parts[-1] else size
            shard = self._shard(part, [first], [last - first])
            shards.append(shard)
            if part.owner == self._rank:
                notes = local_codes(self._codes, config.name).get_buffer(name)
                local.append(Shard(notes[: last - first], shard))
        return self._tensor(local, shards, [size], torch.uint8)

    def _shard(self, part: Part, offsets: list[int], sizes: list[int]) -> ShardMetadata:
        # The codes of others are on the GPU of their owner, whose number is counted on its node.
        device = str(self._device)
        if self._device.type == "cuda" and part.owner != self._rank:
            device = f"cuda:{part.owner % max(1, torch.cuda.device_count())}"
        return ShardMetadata(offsets, sizes, f"rank:{part.owner}/{device}")

    def _tensor(
        self, local: list[Shard], shards: list[ShardMetadata], size: list[int], dtype: torch.dtype
    ) -> ShardedTensor:
        properties = TensorProperties(dtype=dtype, requires_grad=False)
        whole = ShardedTensorMetadata(shards, torch.Size(size), properties)
        return sharded_tensor(local, whole, self._group)


def _note_key(prefix: str, table: str, name: str) -> str:
    return f"{prefix}codes.{table}.{name}"


def _taken(
    config: CCEEmbeddingBagConfig, value: torch.Tensor, own: list[Part], local: ChunkCodes
) -> torch.Tensor:
    """The codes of this rank, from a plain tensor or one that is sharded in the same way."""
    if isinstance(value, ShardedTensor):
        return _taken_from_shards(config, value, own, local)
    found = []
    for part in own:
        (row, column), (rows, width) = part.offsets(config.packing), part.sizes(config.packing)
        found.append(value[row : row + rows, column : column + width])
    return found[0] if len(found) == 1 else torch.cat(found, dim=1)


def _taken_from_shards(
    config: CCEEmbeddingBagConfig, value: ShardedTensor, own: list[Part], local: ChunkCodes
) -> torch.Tensor:
    packing = config.packing
    cut = [part.cut(packing) for part in own]
    shards = {tuple(shard.metadata.shard_offsets): shard for shard in value.local_shards()}
    found = {at: list(shard.metadata.shard_sizes) for at, shard in shards.items()}
    wanted = {tuple(p.offsets(packing)): p.sizes(packing) for parts in cut for p in parts}
    if found != wanted:
        raise ValueError(
            f"table {config.name!r}: the state dict is of another plan; load it by "
            "load_checkpoint, or by dcp.load into model.state_dict(), then load_state_dict"
        )
    read = [[shards[tuple(p.offsets(packing))].tensor for p in parts] for parts in cut]
    # As in `model.state_dict()` that dcp.load has filled: nothing has to be copied.
    if _in_place(read, cut, local):
        return local.stored
    widths = [len(part.chunks) * packing.width for part in own]
    codes = read[0][0].new_empty(packing.rows(len(own[0].ids)), sum(widths))
    for of_ids, columns in zip(read, codes.split(widths, dim=1), strict=True):
        torch.cat(of_ids, out=columns)
    return codes


def _in_place(read: list[list[torch.Tensor]], cut: list[list[Part]], local: ChunkCodes) -> bool:
    """Whether all that was read lies in the buffer itself."""
    pairs = [pair for row in zip(read, cut, strict=True) for pair in zip(*row, strict=True)]
    return all(tensor.data_ptr() == part.view(local).data_ptr() for tensor, part in pairs)


def _own_notes(value: torch.Tensor, own: torch.Tensor, first: int) -> torch.Tensor:
    """Notes of the ids of this rank, from byte `first` on, in the size of its buffer `own`."""
    out = torch.zeros_like(own)
    if isinstance(value, ShardedTensor):
        parts = [shard.tensor for shard in value.local_shards()]
    else:
        parts = [value[first:][: len(out)]]
    for part in parts:
        out[: len(part)] = part
    return out
