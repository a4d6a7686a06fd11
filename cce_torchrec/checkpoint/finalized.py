"""A finalized checkpoint into a model that is not finalized yet: its tables become so first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from cce_torchrec.checkpoint.manifest import TableRecord
from cce_torchrec.checkpoint.tables import choose_tables, describe_tables, is_finalized, unwrapped
from cce_torchrec.codes.chunk_codes import ChunkCodes, codes_of
from cce_torchrec.collectives import Ranks
from cce_torchrec.distributed.embedding_bag_collection import ShardedCCEEmbeddingBagCollection
from cce_torchrec.modules.embedding_bag_collection import CCEEmbeddingBagCollection
from cce_torchrec.packing import CodePacking
from cce_torchrec.table import Table


@contextmanager
def finalized_as(
    model: nn.Module,
    saved: dict[str, TableRecord],
    wanted: Sequence[str] | None,
    ranks: Ranks,
) -> Iterator[list[str]]:
    """Finalizes the tables of `model` that are finalized in a checkpoint; undone if a load fails.

    A collective call. Codebooks keep their rows; codes get the bits that all of those rows need.

    Args:
        model: unsharded, or under DistributedModelParallel.
        saved: the tables of the checkpoint.
        wanted: the tables that are loaded, None for all.
        ranks: those of the load.

    Yields:
        The names of these tables, as `collection.table`.
    """
    before: list[tuple[Table, EmbeddingBagConfig]] = []
    codes_before: list[tuple[ChunkCodes, torch.Tensor | None, CodePacking]] = []

    def begin() -> list[str]:
        current = describe_tables(model)
        names = set(current) if wanted is None else choose_tables(wanted, current, "tables")
        finalized = []
        for name in sorted(names & set(saved)):
            if is_finalized(saved[name], current[name]):
                finalized.append(name)
                for table, codes in _pieces(model, current[name]):
                    before.append((table, table.config))
                    table.finalize()
                    codes_before.extend((c, c.codes, c.packing) for c in codes)
                    for own in codes:
                        own.repack(own.config.packing)
        return finalized

    try:
        yield ranks.each(begin)
    except BaseException:
        for table, config in before:
            table.config = config
        for codes, stored, packing in codes_before:
            codes.set_codes(stored, packing)
        raise


def _pieces(model: nn.Module, record: TableRecord) -> Iterator[tuple[Table, list[ChunkCodes]]]:
    """The table that `record` describes, with its codes on this rank."""
    inside = f"{record.collection}." if record.collection else ""
    for path, module in unwrapped(model).named_modules():
        # A collection of sequences has the one of its bags inside.
        if not isinstance(module, CCEEmbeddingBagCollection | ShardedCCEEmbeddingBagCollection) or (
            not f"{path}.".startswith(inside)
        ):
            continue
        for table in module.tables:
            if table.name == record.name:
                found = codes_of(module.codes, table.name)
                yield table, [] if found is None else [found]
