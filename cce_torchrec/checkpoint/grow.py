"""More ids than the checkpoint has.

Of CCE tables the old ids have their saved codes, and the new ones their hash. Of plain tables the
old rows are saved ones, and the new rows and their optimizer state stay as the model has them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from cce_torchrec.checkpoint.manifest import CCETableRecord, OptimizerRecord, TableRecord
from cce_torchrec.checkpoint.tables import configs_of, table_of, unwrapped
from cce_torchrec.codes.storage import fill_hashed
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
class _GrownTable:
    prefix: str
    """Of the names of its codes in the checkpoint."""
    config: CCEEmbeddingBagConfig
    saved_ids: int
    """Ids that it has in the checkpoint."""


class Growth:
    """Stands in smaller tensors for those that grew, and fills the model's from them."""

    def __init__(
        self,
        model: nn.Module,
        current: dict[str, TableRecord],
        saved: dict[str, TableRecord],
        grow: set[str],
    ) -> None:
        self._grown: list[_GrownTable] = []
        self._current = current
        self._plain: dict[str, int] = {}
        """Rows that plain tables have in the checkpoint."""
        for name in sorted(grow & set(saved)):
            table, num_ids = current[name], saved[name].num_embeddings
            if not isinstance(table, CCETableRecord):
                self._plain[name] = num_ids
            elif table.num_embeddings > num_ids:
                configs = configs_of(unwrapped(model).get_submodule(table.collection))
                config = next(c for c in configs if c.name == table.name)
                path = filter(None, ("model", table.collection, "codes", table.name))
                self._grown.append(
                    _GrownTable(prefix=".".join(path), config=config, saved_ids=num_ids)
                )
        self._finish: list[Callable[[], None]] = []

    def targets(self, state: dict[str, Any]) -> dict[str, Any]:
        """`state` with what grew replaced by tensors of the size in the checkpoint."""
        out = dict(state)
        for table in self._grown:
            codes, seen = f"{table.prefix}.codes", f"{table.prefix}.seen"
            if codes in state:
                out[codes] = self._codes(state[codes], table.config, table.saved_ids)
            if seen in state:
                out[seen] = self._seen(state[seen], table.saved_ids)
        for key in state if self._plain else ():
            out[key] = self.kept(key.removeprefix("model."), out[key])
        return out

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

    def _codes(self, value: Any, config: CCEEmbeddingBagConfig, old: int) -> Any:
        if not isinstance(value, ShardedTensor):
            return self._part(value, config, range(config.num_chunks), 0, old)

        def part(shard: Shard) -> torch.Tensor:
            (first, chunk), (_, chunks) = shard.metadata.shard_offsets, shard.metadata.shard_sizes
            return self._part(shard.tensor, config, range(chunk, chunk + chunks), first, old)

        return _shorter(value, old, part)

    def _part(
        self,
        whole: torch.Tensor,
        config: CCEEmbeddingBagConfig,
        chunks: range,
        first: int,
        old: int,
    ) -> torch.Tensor:
        """What is read for `whole`, the codes of the ids from `first` on."""
        kept = min(max(old - first, 0), len(whole))
        part = torch.empty(kept, len(chunks), dtype=whole.dtype, device=whole.device)

        def finish() -> None:
            whole[:kept] = part
            fill_hashed(whole[kept:], config, chunks, first + kept)

        self._finish.append(finish)
        return part

    def _seen(self, value: Any, old: int) -> Any:
        if not isinstance(value, ShardedTensor):
            return self._bits(value, 0, old)
        return _shorter(
            value,
            old // 8 + 2,
            lambda shard: self._bits(shard.tensor, shard.metadata.shard_offsets[0], old),
        )

    def _bits(self, whole: torch.Tensor, first: int, old: int) -> torch.Tensor:
        """What is read for `whole`, the bits from byte `first` on."""
        kept = min(max(old // 8 + 2 - first, 0), len(whole))
        part = torch.empty(kept, dtype=whole.dtype, device=whole.device)

        def finish() -> None:
            whole.zero_()  # new ids have not been seen
            used = min(kept, max(old // 8 + 1 - first, 0))  # the last byte is a spare
            whole[:used] = part[:used]

        self._finish.append(finish)
        return part


def _shorter(
    value: ShardedTensor, length: int, part: Callable[[Shard], torch.Tensor]
) -> ShardedTensor:
    """`value` with only the first `length` of its rows, of which `part` makes the local ones."""
    before = value.metadata()
    cut = {}
    for place in before.shards_metadata:
        rows = min(length - place.shard_offsets[0], place.shard_sizes[0])
        if rows > 0:
            sizes = [rows, *place.shard_sizes[1:]]
            cut[place] = ShardMetadata(place.shard_offsets, sizes, place.placement)
    local = []
    for shard in value.local_shards():
        made = part(shard)  # also of a shard that is new altogether, which has to be filled
        if shard.metadata in cut:
            local.append(Shard(made, cut[shard.metadata]))
    after = ShardedTensorMetadata(
        shards_metadata=list(cut.values()),
        size=torch.Size([length, *before.size[1:]]),
        tensor_properties=before.tensor_properties,
    )
    return sharded_tensor(local, after, group_of(value))
