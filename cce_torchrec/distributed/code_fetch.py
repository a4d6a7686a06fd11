"""The first hop of ROW_WISE tables: ids to the owners of their codes, codes back.

Before the input distribution, on the rank that has the batch, the features of such tables become
physical ones whose values are codebook rows; these then go to the owners of the codebooks as ids of
plain tables would. Distinct ids cross the network, once: popular ids live together in the first
blocks, whose owner would otherwise answer for most of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from cce_torchrec.codes.chunk_codes import ChunkCodes, codes_of
from cce_torchrec.codes.storage import mark_seen, widen
from cce_torchrec.distributed.id_partition import IdPartition
from cce_torchrec.lookup.bounds import BoundsCheck
from cce_torchrec.lookup.expansion import Expansion, Work
from cce_torchrec.lookup.table_lookup import TableLookup
from cce_torchrec.modules.embedding_bag_collection import select_slots
from cce_torchrec.table import Table, TableFeature, physical_feature

_FAILED = -1
Answered = list[tuple[ChunkCodes, torch.Tensor]]
"""Codes of this rank that keep bits of seen ids, and the positions in them that were asked for."""


def mark_answered(answered: Answered) -> None:
    """Marks ids as seen when they are looked up, which pipelines do after later ones are sent."""
    for held, own in answered:
        if held.seen is not None and held.training:
            mark_seen(held.seen, own)


class CodeFetch(Expansion):
    """Expands the slots of ROW_WISE tables by codes that live on other ranks; collective."""

    # Half the bytes on the network, unless int64 ids of other tables go with them; lookups widen.
    _dtype = torch.int32

    def __init__(
        self,
        blocks: list[TableLookup],
        slots: list[TableFeature],
        keys: list[str],
        others: list[str],
        ids: list[IdPartition],
        group: dist.ProcessGroup,
    ) -> None:
        super().__init__(blocks, slots, keys)
        self._others, self._ids, self._group = others, ids, group
        self._kernel_takes = False
        self._answered: Answered = []

    @classmethod
    def of(
        cls,
        tables: Sequence[Table],
        codes: nn.ModuleDict,
        row_wise: dict[str, IdPartition],
        group: dist.ProcessGroup | None,
    ) -> CodeFetch | None:
        """For those of a collection's `tables` in `row_wise`; None without such tables.

        Args:
            codes: with those of this rank's blocks.
        """
        blocks: list[TableLookup] = []
        slots: list[TableFeature] = []
        keys: list[str] = []
        others: list[str] = []
        for table in tables:
            config = table.config
            if config.name not in row_wise:
                others += config.feature_names
                continue
            held = codes_of(codes, config.name)
            assert held is not None
            at = range(len(slots), len(slots) + len(config.feature_names))
            blocks.append(TableLookup(table, list(at), held, held.chunks))
            slots += [TableFeature(config.name, feature) for feature in config.feature_names]
            keys += [
                physical_feature(config.name, feature, chunk)
                for chunk in held.chunks
                for feature in config.feature_names
            ]
        if not blocks:
            return None
        assert group is not None
        ids = [row_wise[block.config.name] for block in blocks]
        return cls(blocks, slots, keys, list(dict.fromkeys(others)), ids, group)

    def replace(
        self, features: KeyedJaggedTensor, check: BoundsCheck
    ) -> tuple[KeyedJaggedTensor, Answered]:
        """`features` with those of ROW_WISE tables as rows, by chunk; collective.

        Also the ids that this rank answered for and has to mark as seen, once they are looked up.

        Raises:
            ValueError: on every rank, if ids of any are refused (bounds_check_mode FATAL).
        """
        self._answered = []
        rows = self(select_slots(features, [slot.feature for slot in self.slots]), check)
        if self._others:
            rows = KeyedJaggedTensor.concat([select_slots(features, self._others), rows])
        return rows, self._answered

    def _write_rows(self, work: list[Work], check: BoundsCheck) -> None:
        """Rows of the ids of every block, after one exchange for all of them."""
        failure: Exception | None = None
        distinct: list[torch.Tensor] = []
        checked: list[tuple[torch.Tensor, torch.Tensor]] = []
        try:
            for block, (who, ids, _) in zip(self.blocks, work, strict=True):
                valid = check(who, ids, block.config.num_embeddings).long()
                rising, inverse = torch.unique(valid, return_inverse=True)
                distinct.append(rising)
                checked.append((valid, inverse))
        except Exception as error:  # told to every rank, as all of them wait for this one
            failure = error
        codes = self._exchange(distinct, failure)
        for block, (_, _, out), (ids, at), own in zip(
            self.blocks, work, checked, codes, strict=True
        ):
            held = _held(block)
            parts = [widen(own[at]).t()]
            if block.rows_per_id == 2:
                parts.append(held.helper_rows(ids) + held.config.num_rows)
            rows = torch.stack(parts, dim=-1)
            out.view(rows.shape).copy_(rows)

    def _exchange(
        self, distinct: list[torch.Tensor], failure: Exception | None
    ) -> list[torch.Tensor]:
        """Codes [U, c] of the rising ids [U] of each block, in storage type.

        Raises:
            ValueError: on every rank, if any has failed before.
        """
        pieces, asked, answered = self._exchange_counts(distinct, failure)
        wanted = self._sent(torch.cat(pieces), [sum(row) for row in asked], answered)
        replies = self._codes_of(wanted, answered)
        sizes = [_bytes_per_id(block) for block in self.blocks]
        returned = [[n * s for n, s in zip(row, sizes, strict=True)] for row in asked]
        sent = [sum(n * s for n, s in zip(row, sizes, strict=True)) for row in answered]
        by_rank = self._sent(replies, sent, returned).split([n for row in returned for n in row])
        return [
            torch.cat(by_rank[t :: len(self.blocks)]).view(codes.dtype).view(-1, codes.shape[1])
            for t, codes in enumerate(map(_codes, self.blocks))
        ]

    def _exchange_counts(
        self, distinct: list[torch.Tensor], failure: Exception | None
    ) -> tuple[list[torch.Tensor], list[list[int]], list[list[int]]]:
        """Ids to ask each rank for, in turn by block; how many, and how many others ask for here.

        A rank that has failed says so in its counts: the others wait for them.
        """
        ranks, tables = dist.get_world_size(self._group), len(self.blocks)
        device = _held(self.blocks[0]).clusterings.device
        counts = torch.full((ranks, tables), _FAILED, device=device)
        cuts: list[list[int]] = []
        if failure is None:
            each = [ids.cuts(rising) for ids, rising in zip(self._ids, distinct, strict=True)]
            counts = torch.stack([c.diff() for c in each], dim=1).contiguous()
            cuts = torch.stack(each).tolist()
        theirs = torch.empty_like(counts)
        dist.all_to_all_single(theirs, counts, group=self._group)
        asked, answered = counts.tolist(), theirs.tolist()
        if failure is not None:
            raise failure
        _raise_if_any_failed(answered)
        pieces = [
            distinct[t][cuts[t][r] : cuts[t][r + 1]] for r in range(ranks) for t in range(tables)
        ]
        return pieces, asked, answered

    def _sent(
        self, values: torch.Tensor, to_each: list[int], from_each: list[list[int]]
    ) -> torch.Tensor:
        """What the other ranks send when this one sends `values`, by counts."""
        received = [sum(row) for row in from_each]
        out = values.new_empty(sum(received))
        dist.all_to_all_single(out, values, received, to_each, group=self._group)
        return out

    def _codes_of(self, wanted: torch.Tensor, counts: list[list[int]]) -> torch.Tensor:
        """Codes of the ids that other ranks ask for, as bytes in their order."""
        pieces = wanted.split([n for row in counts for n in row])
        tables, replies = len(self.blocks), list(pieces)
        for t, block in enumerate(self.blocks):
            held = _held(block)
            own = torch.cat(pieces[t::tables]) - held.ids.start
            if held.seen is not None:
                self._answered.append((held, own))
            found = _codes(block).index_select(0, own).view(-1).view(torch.uint8)
            size = _bytes_per_id(block)
            replies[t::tables] = found.split([row[t] * size for row in counts])
        return torch.cat(replies)


def _raise_if_any_failed(counts: list[list[int]]) -> None:
    failed = [rank for rank, row in enumerate(counts) if _FAILED in row]
    if failed:
        raise ValueError(f"the batch of ranks {failed} could not be looked up; see their error")


def _held(block: TableLookup) -> ChunkCodes:
    assert block.codes is not None
    return block.codes


def _codes(block: TableLookup) -> torch.Tensor:
    codes = _held(block).codes
    assert codes is not None
    return codes


def _bytes_per_id(block: TableLookup) -> int:
    codes = _codes(block)
    return codes.shape[1] * codes.element_size()
