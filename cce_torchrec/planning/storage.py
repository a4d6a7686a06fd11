"""Bytes of tables, codes and optimizer state, as plans count them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torchrec.distributed.planner import Topology
from torchrec.distributed.planner.types import ShardEstimator, ShardingOption, Storage
from torchrec.distributed.types import ShardingType
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from cce_torchrec.config import CCEEmbeddingBagConfig, is_cce
from cce_torchrec.distributed.id_partition import IdPartition, codebook_owners
from cce_torchrec.optimizer_state import OptimizerKind, kind_of
from cce_torchrec.torchrec_internals import optimizer_class_in_backward


def optimizer_bytes(
    table: EmbeddingBagConfig, parameter: nn.Parameter, rows: int, width: int
) -> int:
    """State of FBGEMM's fused optimizer for a shard [rows, width] of `table`.

    `parameter` carries the optimizer that was applied in backward.
    """
    chunk_dim = table.chunk_dim if is_cce(table) else width
    return _fused_kind(parameter).fused_bytes(rows=rows, width=width, chunk_dim=chunk_dim)


def _fused_kind(parameter: nn.Parameter) -> OptimizerKind:
    return kind_of(optimizer_class_in_backward(parameter))


class CodeStorageEstimator(ShardEstimator):
    """Adds codes, and what TorchRec misses of the optimizer, to the storage of CCE shards.

    TorchRec's own estimator runs before it, and sees the proxy of the codebooks [k + k', D]. Under
    ROW_WISE, whose shard i TorchRec gives to rank i, a shard has the codes of a block of ids and
    whole codebooks.
    """

    def __init__(self, topology: Topology, tables: Sequence[EmbeddingBagConfig]) -> None:
        self._on_gpu = topology.compute_device == "cuda"
        self._tables = {t.name: t for t in tables if is_cce(t)}

    def estimate(
        self, sharding_options: list[ShardingOption], sharder_data_map: Any = None, **_: Any
    ) -> None:
        """Adds to the storage of each shard in place."""
        for option in sharding_options:
            table = self._tables.get(option.name)
            if table is None:
                continue
            for rank, shard in enumerate(option.shards):
                added = _uncounted_bytes(table, option, rank)
                on_device = {"hbm": added, "ddr": 0} if self._on_gpu else {"hbm": 0, "ddr": added}
                shard.storage = (shard.storage or Storage(hbm=0, ddr=0)) + Storage(**on_device)


def _uncounted_bytes(table: CCEEmbeddingBagConfig, option: ShardingOption, rank: int) -> int:
    """What a shard takes more than TorchRec's estimator says, which knows of no codes."""
    rows, width = option.shards[rank].size
    kind = _fused_kind(option.tensor)
    if option.sharding_type != ShardingType.ROW_WISE.value:
        # TorchRec divides row-wise state among shards of columns. Each chunk has all of it.
        counted = kind.fused_bytes(rows=rows, width=width, chunk_dim=table.embedding_dim)
        codes = -(-table.code_bytes * width // table.embedding_dim)
        codes += table.notes_bytes(table.num_embeddings)
        return codes + optimizer_bytes(table, option.tensor, rows, width) - counted
    # TorchRec counts a block of the codebooks' rows, which no rank has: rows are never cut.
    counted = rows * width * option.tensor.element_size()
    counted += kind.fused_bytes(rows=rows, width=width, chunk_dim=width)
    partition = IdPartition(table.num_embeddings, tuple(range(len(option.shards))))
    return sum(row_wise_bytes(table, option.tensor, partition, rank)) - counted


def row_wise_bytes(
    table: CCEEmbeddingBagConfig, parameter: nn.Parameter, partition: IdPartition, rank: int
) -> tuple[int, int, int]:
    """Bytes of codebooks, codes (and bits) and optimizer state that `rank` holds of `table`."""
    width = codebook_owners(table, partition).count(rank) * table.chunk_dim
    ids = len(partition.ids(rank))
    codes = table.packing.nbytes(ids, table.num_chunks)
    rows = table.rows_per_chunk
    return (
        rows * width * parameter.element_size(),
        codes + table.notes_bytes(ids),
        optimizer_bytes(table, parameter, rows, width),
    )
