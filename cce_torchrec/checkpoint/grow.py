"""More ids than the checkpoint has: saved codes for the old ones, the hash for the new."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor
from torch.distributed._shard.sharded_tensor.metadata import ShardedTensorMetadata

from cce_torchrec.checkpoint.tables import Tables, configs_of, unwrapped
from cce_torchrec.codes import fill_hashed
from cce_torchrec.config import CCEEmbeddingBagConfig


class Growth:
    """Stands in smaller tensors for those that grew, and fills the model's from them."""

    def __init__(self, model: nn.Module, own: Tables, saved: Tables, grow: set[str]) -> None:
        self._own = {
            name: saved[name]["num_embeddings"]
            for name in grow & set(saved)
            if own[name]["num_embeddings"] > saved[name]["num_embeddings"]
        }
        self._configs: dict[str, CCEEmbeddingBagConfig] = {}
        for name in self._own:
            configs = configs_of(unwrapped(model).get_submodule(own[name]["collection"]))
            self._configs[name] = next(c for c in configs if c.name == own[name]["name"])
        self._prefix = {
            name: ".".join(
                filter(None, ("model", own[name]["collection"], "codes", own[name]["name"]))
            )
            for name in self._own
        }
        self._finish: list[Callable[[], None]] = []

    def targets(self, state: dict[str, Any]) -> dict[str, Any]:
        """`state` with what grew replaced by tensors of the size in the checkpoint."""
        out = dict(state)
        for name, old in self._own.items():
            config = self._configs[name]
            codes, seen = f"{self._prefix[name]}.codes", f"{self._prefix[name]}.seen"
            if codes in state:
                out[codes] = self._codes(state[codes], config, old)
            if seen in state:
                out[seen] = self._seen(state[seen], old)
        return out

    def finish(self) -> None:
        """Fills what grew, once the targets were read."""
        for finish in self._finish:
            finish()

    def _codes(self, value: Any, config: CCEEmbeddingBagConfig, old: int) -> Any:
        if isinstance(value, ShardedTensor):
            before = value.metadata()
            rows = {
                m: ShardMetadata(m.shard_offsets, [old, m.shard_sizes[1]], m.placement)
                for m in before.shards_metadata
            }
            local = []
            for shard in value.local_shards():
                first, count = shard.metadata.shard_offsets[1], shard.metadata.shard_sizes[1]
                part = self._part(shard.tensor, config, list(range(first, first + count)), old)
                local.append(Shard(part, rows[shard.metadata]))
            after = ShardedTensorMetadata(
                shards_metadata=list(rows.values()),
                size=torch.Size([old, config.num_chunks]),
                tensor_properties=before.tensor_properties,
            )
            return ShardedTensor._init_from_local_shards_and_global_metadata(
                local, after, process_group=value._process_group
            )
        return self._part(value, config, list(range(config.num_chunks)), old)

    def _part(
        self, whole: torch.Tensor, config: CCEEmbeddingBagConfig, chunks: list[int], old: int
    ) -> torch.Tensor:
        part = torch.empty(old, len(chunks), dtype=whole.dtype, device=whole.device)

        def finish() -> None:
            whole[:old] = part
            fill_hashed(whole[old:], config, chunks, first=old)

        self._finish.append(finish)
        return part

    def _seen(self, whole: torch.Tensor, old: int) -> torch.Tensor:
        part = torch.empty(old // 8 + 2, dtype=whole.dtype, device=whole.device)

        def finish() -> None:
            whole.zero_()
            whole[: old // 8 + 1] = part[: old // 8 + 1]  # the last byte is a spare

        self._finish.append(finish)
        return part
