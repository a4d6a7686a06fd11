"""Bytes of tables, codes and optimizer state, as plans count them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torchrec.distributed.planner import Topology
from torchrec.distributed.planner.types import ShardEstimator, ShardingOption, Storage
from torchrec.distributed.types import ShardingType
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from cce_torchrec.config import CCEEmbeddingBagConfig, code_dtype, is_cce
from cce_torchrec.distributed.id_partition import IdPartition, codebook_owners
from cce_torchrec.torchrec_internals import optimizer_class_in_backward


def optimizer_bytes(
    table: EmbeddingBagConfig, parameter: nn.Parameter, rows: int, width: int
) -> int:
    """State of FBGEMM's fused optimizer for a shard [rows, width] of `table`.

    `parameter` carries the optimizer that was applied in backward; state is float32.
    """
    chunk = table.chunk_dim if is_cce(table) else width
    return _optimizer_bytes(parameter, rows, width, chunk)


def _optimizer_bytes(parameter: nn.Parameter, rows: int, width: int, chunk: int) -> int:
    rowwise, whole = -(-4 * rows * width // chunk) if width else 0, 4 * rows * width
    return {
        "RowWiseAdagrad": rowwise,
        "Adagrad": whole,
        "Adam": 2 * whole,
        "PartialRowWiseAdam": whole + rowwise,
    }.get(optimizer_class_in_backward(parameter), 0)


class CodeStorageEstimator(ShardEstimator):
    """Adds codes, and what TorchRec misses of the optimizer, to the storage of CCE shards.

    TorchRec's own estimator sees the proxy of the codebooks [k + k', D], and divides its row-wise
    state among shards of columns; such a shard holds the codes of the chunks in them, and row-wise
    state once per chunk. Under ROW_WISE, whose
    shard i TorchRec gives to rank i, it holds the codes of a block of ids and whole codebooks.
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
            row_wise = option.sharding_type == ShardingType.ROW_WISE.value
            blocks = IdPartition(table.num_embeddings, tuple(range(len(option.shards))))
            for rank, shard in enumerate(option.shards):
                rows, width = shard.size
                if row_wise:
                    held = sum(row_wise_bytes(table, option.tensor, blocks, rank))
                    added = held - _as_torchrec_counts(option.tensor, rows, width)
                else:
                    added = -(-table.code_bytes * width // table.embedding_dim) + table.seen_bytes
                    added += optimizer_bytes(table, option.tensor, rows, width)
                    added -= _optimizer_bytes(option.tensor, rows, width, table.embedding_dim)
                assert shard.storage is not None
                shard.storage += Storage(
                    hbm=added if self._on_gpu else 0, ddr=0 if self._on_gpu else added
                )


def row_wise_bytes(
    table: CCEEmbeddingBagConfig, parameter: nn.Parameter, blocks: IdPartition, rank: int
) -> tuple[int, int, int]:
    """Bytes of codebooks, codes (and bits) and optimizer state that `rank` holds of `table`."""
    width = codebook_owners(table, blocks).count(rank) * table.chunk_dim
    ids = len(blocks.ids(rank))
    codes = ids * table.num_chunks * code_dtype(table.num_rows).itemsize * table.learned_codes
    rows = table.rows_per_chunk
    return (
        rows * width * parameter.element_size(),
        codes + (ids // 8 + 2) * table.track_seen,
        optimizer_bytes(table, parameter, rows, width),
    )


def _as_torchrec_counts(parameter: nn.Parameter, rows: int, width: int) -> int:
    """Weights and optimizer state of a shard [rows, width] of a plain table."""
    weights = rows * width * parameter.element_size()
    return weights + _optimizer_bytes(parameter, rows, width, width)
