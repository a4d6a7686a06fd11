"""Codes in a sharded module's state dict: one ShardedTensor [N, c] per logical table.

Its shards are columns, one per run of neighbouring chunks that a rank owns, so that
torch.distributed.checkpoint saves them at one world size and plan and loads them at another, or
as the plain tensor of the unsharded module.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor
from torch.distributed._shard.sharded_tensor.metadata import ShardedTensorMetadata, TensorProperties
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from cce_torchrec.chunk_codes import codes_of
from cce_torchrec.codes import code_dtype
from cce_torchrec.config import CCEEmbeddingBagConfig
from cce_torchrec.helper_rows import check_helper_rows, save_helper_rows


def _runs(owners: list[int]) -> list[tuple[int, int, int]]:
    """(owner, first chunk, number of chunks) of neighbouring chunks of one owner."""
    out, first = [], 0
    for owner, chunks in itertools.groupby(owners):
        count = len(list(chunks))
        out.append((owner, first, count))
        first += count
    return out


def codes_key(prefix: str, table: str) -> str:
    """Name of a table's codes in a state dict."""
    return f"{prefix}codes.{table}.codes"


class CodesState:
    """State-dict hooks of one sharded collection."""

    def __init__(
        self,
        codes: nn.ModuleDict,
        configs: Sequence[EmbeddingBagConfig],
        owners: dict[str, list[int]],
        rank: int,
        device: torch.device,
        group: dist.ProcessGroup | None,
    ) -> None:
        self._codes, self._owners, self._rank = codes, owners, rank
        self.set_configs(configs)
        self._device, self._group = device, group

    def set_configs(self, configs: Sequence[EmbeddingBagConfig]) -> None:
        """The collection's tables, as they are now; codes of a data-parallel one stay a tensor."""
        compressed = [c for c in configs if isinstance(c, CCEEmbeddingBagConfig)]
        self._compressed = compressed
        learned = [config for config in compressed if config.learned_codes]
        self._learned = {config.name for config in learned}
        self._configs = [config for config in learned if config.name in self._owners]

    def save(
        self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]
    ) -> None:
        """Replaces this rank's columns by the table's ShardedTensor, on every rank."""
        for config in self._configs:
            state[codes_key(prefix, config.name)] = self._sharded(config)
        save_helper_rows(self._compressed, state, prefix)

    def load(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Replaces a table's ShardedTensor by this rank's columns, where it has any.

        Raises:
            ValueError: codes of another table size or number of chunks, naming both, or of a
                table whose codes are not learned here, or other main and helper rows.
        """
        check_helper_rows(self._compressed, state, prefix, missing=rest[2])
        for key in state:
            table = key.removeprefix(f"{prefix}codes.").removesuffix(".codes")
            if key == codes_key(prefix, table) and table not in self._learned:
                raise ValueError(
                    f"table {table!r}: the checkpoint has codes, the model has no learned codes "
                    "for it; configure the table as it was saved"
                )
        for config in self._configs:
            key = codes_key(prefix, config.name)
            if key not in state:
                if not self._own_runs(config):  # an owner misses its buffer itself
                    rest[2].append(key)
                continue
            value = state[key]
            expected = (config.num_embeddings, config.num_chunks)
            if isinstance(value, ShardedTensor):
                if tuple(value.size()) != expected:
                    raise ValueError(_mismatch(config, tuple(value.size())))
                shards = {
                    shard.metadata.shard_offsets[1]: shard.tensor for shard in value.local_shards()
                }
                firsts = [first for _, first, _ in self._own_runs(config)]
                if sorted(shards) != firsts:
                    raise ValueError(
                        f"table {config.name!r}: the state dict is of another plan; load it by "
                        "load_checkpoint, or by dcp.load into model.state_dict()"
                    )
                mine = [shards[first] for first in firsts]
            elif isinstance(value, torch.Tensor) and tuple(value.shape) == expected:
                mine = [value[:, first : first + n] for _, first, n in self._own_runs(config)]
            else:
                raise ValueError(_mismatch(config, tuple(getattr(value, "shape", ()))))
            if mine:
                state[key] = torch.cat(mine, dim=1) if len(mine) > 1 else mine[0]
            else:
                del state[key]

    def _own_runs(self, config: CCEEmbeddingBagConfig) -> list[tuple[int, int, int]]:
        return [run for run in _runs(self._owners[config.name]) if run[0] == self._rank]

    def _sharded(self, config: CCEEmbeddingBagConfig) -> ShardedTensor:
        rows = config.num_embeddings
        shards, local = [], []
        held = codes_of(self._codes, config.name)
        for owner, first, count in _runs(self._owners[config.name]):
            device = "cpu" if self._device.type == "cpu" else f"{self._device.type}:{owner}"
            metadata = ShardMetadata([0, first], [rows, count], f"rank:{owner}/{device}")
            shards.append(metadata)
            if owner == self._rank:
                assert held is not None and held.codes is not None
                column = held.chunks.index(first)
                # The whole buffer is its own shard; a part of it is copied, as shards must be
                # contiguous.
                part = held.codes[:, column : column + count].contiguous()
                local.append(Shard(part, metadata))
        properties = TensorProperties(dtype=code_dtype(config.num_rows), requires_grad=False)
        return ShardedTensor._init_from_local_shards_and_global_metadata(
            local,
            ShardedTensorMetadata(
                shards_metadata=shards,
                size=torch.Size([rows, config.num_chunks]),
                tensor_properties=properties,
            ),
            process_group=self._group,
        )


def _mismatch(config: CCEEmbeddingBagConfig, found: tuple[int, ...]) -> str:
    return (
        f"table {config.name!r}: the checkpoint has codes {list(found)}, the model "
        f"[{config.num_embeddings}, {config.num_chunks}] (num_embeddings, num_chunks); configure "
        "the table as it was saved"
    )
