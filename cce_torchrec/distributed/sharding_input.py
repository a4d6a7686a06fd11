"""Each of TorchRec's shardings over logical slots: where ids go, and what they become there."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import nn
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.sharding.dp_sharding import (
    DpPooledEmbeddingSharding,
    DpSparseFeaturesDist,
)
from torchrec.distributed.sharding.rw_sharding import RwPooledEmbeddingSharding
from torchrec.distributed.sharding.tw_sharding import TwSparseFeaturesDist
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from cce_torchrec.codes.chunk_codes import local_codes
from cce_torchrec.config import CCEEmbeddingBagConfig
from cce_torchrec.lookup.expansion import Expansion
from cce_torchrec.lookup.output import LogicalOutput
from cce_torchrec.lookup.table_lookup import TableLookup
from cce_torchrec.table import Table, TableFeature, physical_feature
from cce_torchrec.torchrec_internals import ranks_of, shardings_of


@dataclass(frozen=True)
class ShardingInput:
    """How ids reach the lookup of one of TorchRec's shardings, and are expanded there."""

    dist: nn.Module
    """Takes a KJT of `slots` to the ranks that own their tables' chunks."""
    redistribute: nn.Module
    """The same, for batches that are distributed again while they are looked up."""
    slots: list[TableFeature]
    """Per rank in turn, each slot once; of ROW_WISE tables, the physical features."""
    looked_up: list[TableFeature]
    """Logical slot of each physical feature of all ranks, in the order of the lookups' outputs."""
    expansion: Expansion | None
    """Of the slots that this rank receives; None where they are local rows already."""
    before: Expansion | None = None
    """What is done to the slots on the rank that has the batch."""
    stays: bool = False
    """Whether nothing is sent."""
    replicated: bool = False
    """Whether its tables are whole on every rank."""


def sharding_inputs(
    inner: ShardedEmbeddingBagCollection,
    tables: Sequence[Table],
    output: LogicalOutput,
    codes: nn.ModuleDict,
    row_wise: Collection[str],
    rank: int,
) -> list[ShardingInput]:
    """One entry per sharding of `inner`, whose tables are the chunks of `tables`.

    Args:
        codes: of the chunks that `rank` owns.
        row_wise: tables whose ids arrive as rows of their chunks, by physical feature.
    """
    slot_of = {
        name: slot
        for slot, names in zip(output.slots, output.physical, strict=True)
        for name in names
    }
    return [
        _row_wise_input(sharding, tables, slot_of)
        if isinstance(sharding, RwPooledEmbeddingSharding)
        else _input(sharding, tables, slot_of, codes, row_wise, rank)
        for sharding in shardings_of(inner)
    ]


def _input(
    sharding: Any,
    tables: Sequence[Table],
    slot_of: dict[str, TableFeature],
    codes: nn.ModuleDict,
    row_wise: Collection[str],
    rank: int,
) -> ShardingInput:
    """Of whole tables: each slot goes once to every rank that has a chunk of its table."""
    data_parallel = isinstance(sharding, DpPooledEmbeddingSharding)
    per_rank = [sharding.feature_names()] if data_parallel else sharding.feature_names_per_rank()
    slots_per_rank = [
        list(dict.fromkeys(_arriving(slot_of[n], n, row_wise) for n in names)) for names in per_rank
    ]
    counts = [len(slots) for slots in slots_per_rank]
    # A data-parallel sharding has one list of features, which is every rank's.
    mine = 0 if data_parallel else rank
    names, slots = list(per_rank[mine]), slots_per_rank[mine]
    # A rank that is alone in its group keeps its ids: nothing is sent, and nothing waits for it.
    stays = data_parallel or dist.get_world_size(ranks_of(sharding)) == 1
    make: Any = DpSparseFeaturesDist
    if not stays:
        make = partial(TwSparseFeaturesDist, ranks_of(sharding), counts)
    return ShardingInput(
        dist=make(),
        # Train pipelines put a forward of their own into `dist`, whose first exchange is one with
        # those of other modules; only they can wait for it.
        redistribute=make(),
        slots=[slot for slots in slots_per_rank for slot in slots],
        looked_up=[slot_of[name] for names in per_rank for name in names],
        expansion=Expansion(_table_lookups(tables, codes, names, slots, row_wise), slots, names),
        stays=stays,
        replicated=data_parallel,
    )


def _row_wise_input(
    sharding: RwPooledEmbeddingSharding,
    tables: Sequence[Table],
    slot_of: dict[str, TableFeature],
) -> ShardingInput:
    """Of plain tables cut by rows, as TorchRec does it."""
    names = sharding.feature_names()
    slots = [slot_of[name] for name in names]
    return ShardingInput(
        dist=sharding.create_input_dist(),
        redistribute=sharding.create_input_dist(),
        slots=slots,
        looked_up=slots,
        expansion=None,
        # Ids are checked here: what arrives elsewhere is counted from the first row of its rank.
        before=Expansion(_table_lookups(tables, nn.ModuleDict(), names, slots, ()), slots, names),
    )


def _arriving(slot: TableFeature, name: str, row_wise: Collection[str]) -> TableFeature:
    """What ids of the physical feature `name` of `slot` are called when they arrive."""
    return TableFeature(slot.table, name) if slot.table in row_wise else slot


def _as_plain(config: CCEEmbeddingBagConfig, features: list[str]) -> EmbeddingBagConfig:
    """A chunk as the plain table that it is where rows arrive, not ids."""
    return EmbeddingBagConfig(
        name=f"rows of {config.name}",
        num_embeddings=config.rows_per_chunk,
        embedding_dim=config.chunk_dim,
        feature_names=features,
    )


def _table_lookups(
    tables: Sequence[Table],
    codes: nn.ModuleDict,
    names: list[str],
    slots: list[TableFeature],
    row_wise: Collection[str],
) -> list[TableLookup]:
    """The lookups that produce the physical features `names`, in order, from `slots`."""
    position = {slot: i for i, slot in enumerate(slots)}
    by_first: dict[str, tuple[Table, list[str], int | None]] = {}
    for table in tables:
        for chunk in table.chunks:
            names_of = table.config.feature_names
            features = [physical_feature(table.name, f, chunk) for f in names_of]
            by_first[features[0]] = (table, features, chunk)
    lookups: list[TableLookup] = []
    at = 0
    while at < len(names):
        table, features, chunk = by_first[names[at]]
        # Ids of a table's features are expanded as one run, and so are its rows written.
        assert names[at : at + len(features)] == features, "TorchRec tore a table apart"
        at += len(features)
        if table.name in row_wise:
            own = [position[TableFeature(table.name, name)] for name in features]
            plain = Table(_as_plain(table.compressed, features))
            lookups.append(TableLookup(plain, own, None, []))
            continue
        own = [position[TableFeature(table.name, f)] for f in table.config.feature_names]
        if chunk is None:
            lookups.append(TableLookup(table, own, None, []))
            continue
        chunk_codes = local_codes(codes, table.name)
        column = chunk_codes.chunks.index(chunk)
        # Neighbouring chunks are one lookup, so that all codes of an id are read at once.
        if lookups and lookups[-1].table is table:
            lookups[-1].columns.append(column)
        else:
            lookups.append(TableLookup(table, own, chunk_codes, [column]))
    return lookups
