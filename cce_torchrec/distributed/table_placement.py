"""Where the tables of a sharded collection are: whole, by chunks, or their codes by ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torchrec.distributed.types import ParameterSharding
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from cce_torchrec.codes.chunk_codes import codes_of
from cce_torchrec.config import is_cce
from cce_torchrec.distributed.id_partition import IdPartition, is_row_wise
from cce_torchrec.distributed.plan import chunk_owners, is_data_parallel
from cce_torchrec.table import Table


@dataclass(frozen=True, kw_only=True)
class TablePlacement:
    """Which table is where, as one collection's part of a plan says it."""

    plain_row_wise: set[str]
    """Plain tables that are cut by rows."""
    data_parallel: set[str]
    """Tables that are whole on every rank."""
    chunk_owners: dict[str, list[int]]
    """Rank of each chunk's codebook, per CCE table that is not data-parallel."""
    id_partitions: dict[str, IdPartition]
    """Which rank has the codes of which ids, per ROW_WISE table with codes."""

    @classmethod
    def from_plan(
        cls, configs: Sequence[EmbeddingBagConfig], params: dict[str, ParameterSharding]
    ) -> TablePlacement:
        """The placement of the tables `configs` under `params`, their part of a plan.

        Raises:
            ValueError: a table without an entry, or whose entry cannot be carried out.
        """
        missing = [c.name for c in configs if c.name not in params]
        if missing:
            raise ValueError(
                f"the plan has no entry for tables {missing} of the collection; it has "
                f"{sorted(params)}. Make the plan of the model as it is now, by make_plan or a "
                "planner with sharders=cce_torchrec.get_default_sharders()"
            )
        compressed = [c for c in configs if is_cce(c)]
        by_rows = {c.name for c in configs if is_row_wise(params[c.name])}
        data_parallel = {c.name for c in configs if is_data_parallel(params[c.name])}
        return cls(
            plain_row_wise=by_rows - {c.name for c in compressed},
            data_parallel=data_parallel,
            chunk_owners={
                c.name: chunk_owners(c, params[c.name])
                for c in compressed
                if c.name not in data_parallel
            },
            id_partitions={
                c.name: IdPartition.from_plan(c, params[c.name])
                for c in compressed
                # A table without codes is spread by chunks, and nothing is fetched.
                if c.code_bits and c.name in by_rows
            },
        )

    def local_codes(
        self, tables: Sequence[Table], codes: nn.ModuleDict, rank: int, device: torch.device
    ) -> nn.ModuleDict:
        """Of the unsharded `codes`, those that `rank` looks up or answers for, by table.

        Every rank has the buffers of every table, which are empty where others have its chunks:
        names are the same on all ranks, and each counts the clusterings.
        """
        local = nn.ModuleDict()
        for table in tables:
            name, whole = table.name, codes_of(codes, table.name)
            if whole is None:
                continue
            if name in self.id_partitions:
                ids = self.id_partitions[name].ids(rank)
                local[name] = whole.select(table, whole.chunks, device, ids)
                continue
            # All chunks of a data-parallel table are here.
            owners = self.chunk_owners.get(name, [rank] * len(whole.chunks))
            chunks = [chunk for chunk, owner in enumerate(owners) if owner == rank]
            # Of no id, as bits of seen ids would take memory here for nothing.
            ids = whole.ids if chunks else range(0)
            local[name] = whole.select(table, chunks, device, ids)
        return local
