"""More ids than the checkpoint has, and codes of an older form.

Of CCE tables the old ids have their saved codes, and the new ones their hash. Of plain tables the
old rows are saved ones, and the new rows and their optimizer state stay as the model has them.
Formats 2 and 3 have whole codes [N, c] (old_codes.py), which are packed once they are read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from cce_torchrec.checkpoint.manifest import CCETableRecord, OptimizerRecord, TableRecord
from cce_torchrec.checkpoint.tables import configs_of, table_of, unwrapped
from cce_torchrec.codes.old_codes import packed_codes
from cce_torchrec.codes.storage import fill_hashed
from cce_torchrec.codes.whole_codes import whole_dtype
from cce_torchrec.config import CCEEmbeddingBagConfig
from cce_torchrec.torchrec_internals import (
    Shard,
    ShardedTensor,
    ShardedTensorMetadata,
    ShardMetadata,
    group_of,
    sharded_tensor,
)


@dataclass(frozen=True, kw_only=True)
class _SavedTable:
    """A CCE table of which the checkpoint has fewer ids, or codes of an older form."""

    prefix: str
    """Of the names of its codes in the checkpoint."""
    config: CCEEmbeddingBagConfig
    ids: int
    """That it has in the checkpoint."""
    whole: bool
    """Whether its codes are whole there."""

    def shape(self, ids: int, chunks: int) -> list[int]:
        """Of the codes of so many ids and chunks as they are saved."""
        return [ids, chunks] if self.whole else self.config.packing.shape(ids, chunks)

    def room(self, ids: int, chunks: int, device: torch.device) -> torch.Tensor:
        """For them."""
        dtype = whole_dtype(self.config.code_bits) if self.whole else torch.uint8
        return torch.empty(self.shape(ids, chunks), dtype=dtype, device=device)

    def packed(self, read: torch.Tensor) -> torch.Tensor:
        """What was read into the room."""
        return packed_codes(read, self.config.packing) if self.whole else read


class Growth:
    """Stands in tensors as they are saved for those that are others, and fills the model's.

    Args:
        model: that is loaded into.
        current: its tables.
        saved: the checkpoint's.
        grow: tables that have more ids than there.
        whole_codes: whether codes there are not packed.
    """

    def __init__(
        self,
        model: nn.Module,
        current: dict[str, TableRecord],
        saved: dict[str, TableRecord],
        grow: set[str],
        *,
        whole_codes: bool,
    ) -> None:
        self._tables: list[_SavedTable] = []
        self._current, self._whole_codes = current, whole_codes
        self._plain: dict[str, int] = {}
        """Rows that plain tables have in the checkpoint."""
        for name in sorted(set(current) & set(saved)):
            table, num_ids = current[name], saved[name].num_embeddings
            if not isinstance(table, CCETableRecord):
                if name in grow:
                    self._plain[name] = num_ids
            elif name in grow or whole_codes:
                configs = configs_of(unwrapped(model).get_submodule(table.collection))
                config = next(c for c in configs if c.name == table.name)
                path = filter(None, ("model", table.collection, "codes", table.name))
                # Whole codes of 8 bits lie as packed ones do.
                whole = whole_codes and config.code_bits != 8
                if table.num_embeddings > num_ids or whole:
                    self._tables.append(
                        _SavedTable(prefix=".".join(path), config=config, ids=num_ids, whole=whole)
                    )
        self._finish: list[Callable[[], None]] = []

    def targets(self, state: dict[str, Any]) -> dict[str, Any]:
        """`state` with what grew replaced by tensors of the size in the checkpoint."""
        out = dict(state)
        for table in self._tables:
            codes = f"{table.prefix}.codes"
            if codes in state:
                out[codes] = self._codes(state[codes], table)
            if table.ids == table.config.num_embeddings:
                continue
            for name, ids_per_byte in table.config.notes.items():
                key = f"{table.prefix}.{name}"
                if key in state:
                    out[key] = self._notes(state[key], table.ids // ids_per_byte + 2)
        for key in state if self._plain else ():
            out[key] = self.kept(key.removeprefix("model."), out[key])
        return out

    def is_void(self, key: str) -> bool:
        """Whether the state `key` of the checkpoint is of codes that are 0 and no longer saved."""
        tables = (table for table in self._tables if not table.config.code_bits)
        return any(key == f"{table.prefix}.codes" for table in tables)

    def kept(self, name: str, value: Any) -> Any:
        """The rows of a plain table that the checkpoint has, of `value` of its parameter `name`.

        Others are as they are: step counts, for one, and all that is of no table that grew.
        """
        table = table_of(name, self._current) or ""
        if table not in self._plain or not hasattr(value, "size"):
            return value
        old, size = self._plain[table], value.size()
        if not len(size) or size[0] != self._current[table].num_embeddings:
            return value
        if not isinstance(value, ShardedTensor):
            return value[:old]  # a view, as nothing else is to be written

        def part(shard: Shard) -> torch.Tensor:
            first = shard.metadata.shard_offsets[0]
            return shard.tensor[: max(old - first, 0)]

        return _shorter(value, old, part)

    def record(self, name: str, record: OptimizerRecord) -> OptimizerRecord:
        """The optimizer of the parameter `name` with the shapes of a table that has grown."""
        table = table_of(name, self._current) or "" if self._plain else ""
        if table not in self._plain:
            return record
        old, now = self._plain[table], self._current[table].num_embeddings
        state = {k: [now, *v[1:]] if v[:1] == [old] else v for k, v in record.state.items()}
        return replace(record, state=state)

    def finish(self) -> None:
        """Fills what grew, once the targets were read."""
        for finish in self._finish:
            finish()

    def _codes(self, value: Any, table: _SavedTable) -> Any:
        config, packing = table.config, table.config.packing
        if not isinstance(value, ShardedTensor):
            every = range(config.num_embeddings), range(config.num_chunks)
            return self._part(value, table, *every)

        def place_of(shard: ShardMetadata) -> tuple[range, range]:
            (row, byte), (rows, width) = shard.shard_offsets, shard.shard_sizes
            first, chunk = row * packing.group, byte // packing.width
            last = min(first + rows * packing.group, config.num_embeddings)
            return range(first, last), range(chunk, chunk + width // packing.width)

        # Whole codes are counted in ids and chunks, packed ones in rows and bytes.
        def saved_place(shard: ShardMetadata) -> ShardMetadata:
            ids, chunks = place_of(shard)
            kept = range(ids.start, min(ids.stop, max(table.ids, ids.start)))
            offsets = [ids.start, chunks.start] if table.whole else list(shard.shard_offsets)
            return ShardMetadata(offsets, table.shape(len(kept), len(chunks)), shard.placement)

        def part(shard: Shard) -> torch.Tensor:
            return self._part(shard.tensor, table, *place_of(shard.metadata))

        size = table.shape(table.ids, config.num_chunks)
        dtype = whole_dtype(config.code_bits) if table.whole else torch.uint8
        return _replaced(value, size, dtype, saved_place, part)

    def _part(
        self, whole: torch.Tensor, table: _SavedTable, ids: range, chunks: range
    ) -> torch.Tensor:
        """What is read for `whole`, the packed codes of `ids`."""
        kept = min(max(table.ids - ids.start, 0), len(ids))
        part = table.room(kept, len(chunks), whole.device)

        def finish() -> None:
            found = table.packed(part)
            whole[: len(found)] = found
            if kept < len(ids):
                fill_hashed(whole, table.config, chunks, ids, kept)

        self._finish.append(finish)
        return part

    def _notes(self, value: Any, old: int) -> Any:
        """`value` of the `old` bytes that are saved."""
        if not isinstance(value, ShardedTensor):
            return self._bytes(value, 0, old)

        def part(shard: Shard) -> torch.Tensor:
            return self._bytes(shard.tensor, shard.metadata.shard_offsets[0], old)

        return _shorter(value, old, part)

    def _bytes(self, whole: torch.Tensor, first: int, old: int) -> torch.Tensor:
        """What is read for `whole`, the notes from byte `first` on."""
        kept = min(max(old - first, 0), len(whole))
        part = torch.empty(kept, dtype=whole.dtype, device=whole.device)

        def finish() -> None:
            whole.zero_()  # nothing was noted of new ids
            used = min(kept, max(old - 1 - first, 0))  # the last byte is a spare
            whole[:used] = part[:used]

        self._finish.append(finish)
        return part


def _shorter(
    value: ShardedTensor, length: int, part: Callable[[Shard], torch.Tensor]
) -> ShardedTensor:
    """`value` with only the first `length` of its rows, of which `part` makes the local ones."""
    before = value.metadata()

    def place(shard: ShardMetadata) -> ShardMetadata:
        rows = max(0, min(length - shard.shard_offsets[0], shard.shard_sizes[0]))
        return ShardMetadata(shard.shard_offsets, [rows, *shard.shard_sizes[1:]], shard.placement)

    size = [length, *before.size[1:]]
    return _replaced(value, size, before.tensor_properties.dtype, place, part)


def _replaced(
    value: ShardedTensor,
    size: list[int],
    dtype: torch.dtype,
    place: Callable[[ShardMetadata], ShardMetadata],
    part: Callable[[Shard], torch.Tensor],
) -> ShardedTensor:
    """A tensor of `size` whose shards are at the `place` of those of `value`, as `part` makes them.

    Without shards of no rows.
    """
    before = value.metadata()
    made = {shard: place(shard) for shard in before.shards_metadata}
    cut = {shard: new for shard, new in made.items() if new.shard_sizes[0]}
    local = []
    for shard in value.local_shards():
        read = part(shard)  # also of a shard that is new altogether, which has to be filled
        if shard.metadata in cut:
            local.append(Shard(read, cut[shard.metadata]))
    after = ShardedTensorMetadata(
        shards_metadata=list(cut.values()),
        size=torch.Size(size),
        tensor_properties=replace(before.tensor_properties, dtype=dtype),
    )
    return sharded_tensor(local, after, group_of(value))
