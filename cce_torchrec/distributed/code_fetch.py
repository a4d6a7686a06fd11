"""The first hop of ROW_WISE tables: ids to the owners of their codes, codes back.

Before the input distribution, on the rank that has the batch, the features of such tables become
physical ones whose values are codebook rows; these then go to the owners of the codebooks as ids of
plain tables would. Distinct ids cross the network, once: popular ids live together in the first
blocks, whose owner would otherwise answer for most of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from cce_torchrec.codes.chunk_codes import ChunkCodes, local_codes
from cce_torchrec.codes.whole_codes import rows_of, whole, whole_dtype
from cce_torchrec.distributed.batch_in_flight import Answered
from cce_torchrec.distributed.id_partition import IdPartition
from cce_torchrec.lookup.bounds import BoundsCheck
from cce_torchrec.lookup.expansion import Expansion, Work
from cce_torchrec.lookup.table_lookup import TableLookup
from cce_torchrec.modules.embedding_bag_collection import select_slots
from cce_torchrec.table import Table, TableFeature, physical_feature

# In place of a number of ids, which is never negative.
_FAILED = -1


@dataclass
class RowWiseLookup(TableLookup):
    """A table whose learned codes are spread over ranks by ids; this one has a block of them."""

    codes: ChunkCodes
    partition: IdPartition

    @property
    def bytes_per_id(self) -> int:
        """Of an id's codes on the network, all chunks together."""
        return len(self.codes.chunks) * self.dtype.itemsize

    @property
    def dtype(self) -> torch.dtype:
        """Of codes on the network, where those of an id are by themselves and so whole."""
        return whole_dtype(self.codes.packing.bits)

    def codes_of(self, ids: torch.Tensor) -> torch.Tensor:
        """Whole codes [V, c] of `ids` [V], counted from the first id that is here."""
        codes = self.codes
        found = codes.packing.read_words(codes.stored, ids, len(codes.chunks))
        return whole(found, codes.packing.bits)


class CodeFetch(Expansion):
    """Expands the slots of ROW_WISE tables by codes that live on other ranks; collective."""

    # Half the bytes on the network, unless int64 ids of other tables go with them; lookups widen.
    _dtype = torch.int32

    def __init__(
        self,
        lookups: list[RowWiseLookup],
        slots: list[TableFeature],
        keys: list[str],
        *,
        others: list[str],
        group: dist.ProcessGroup | None,
    ) -> None:
        super().__init__(lookups, slots, keys)
        self._row_wise, self._others, self._group = lookups, others, group
        # The kernel reads codes by address, and most of them are in the memory of other ranks.
        self._kernel_takes = False
        self._answered: Answered = []

    @classmethod
    def from_partitions(
        cls,
        tables: Sequence[Table],
        codes: nn.ModuleDict,
        partitions: dict[str, IdPartition],
        group: dist.ProcessGroup | None,
    ) -> CodeFetch | None:
        """For those of a collection's `tables` in `partitions`; None without such tables.

        Args:
            codes: with those of this rank's ids.
        """
        lookups: list[RowWiseLookup] = []
        slots: list[TableFeature] = []
        keys: list[str] = []
        others: list[str] = []
        for table in tables:
            name, features = table.name, table.config.feature_names
            if name not in partitions:
                others += features
                continue
            own = local_codes(codes, name)
            at = list(range(len(slots), len(slots) + len(features)))
            lookups.append(RowWiseLookup(table, at, own, own.chunks, partitions[name]))
            slots += [TableFeature(name, feature) for feature in features]
            keys += [
                physical_feature(name, feature, chunk)
                for chunk in own.chunks
                for feature in features
            ]
        if not lookups:
            return None
        # A feature of several tables is sent once.
        return cls(lookups, slots, keys, others=list(dict.fromkeys(others)), group=group)

    def rows_per_id(self, slot: TableFeature) -> int:
        """Values that an id of `slot` arrives as: the rows of a ROW_WISE table, or itself."""
        tables = (lookup.table for lookup in self._row_wise)
        return next((table.rows_per_id for table in tables if table.name == slot.table), 1)

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

    def refuse(self, refused: Exception) -> None:
        """Raises `refused`, and an error on the ranks that wait for what this one asks for.

        Raises:
            Exception: `refused`.
        """
        self._exchange_counts([], refused)

    def _write_rows(self, work: list[Work], check: BoundsCheck) -> None:
        """Rows of the ids of every table, after one exchange for all of them."""
        failure: Exception | None = None
        distinct: list[torch.Tensor] = []
        checked: list[tuple[torch.Tensor, torch.Tensor]] = []
        try:
            for lookup, (name, ids, _) in zip(self._row_wise, work, strict=True):
                valid = check(name, ids, lookup.config.num_embeddings).long()
                rising, inverse = torch.unique(valid, return_inverse=True)
                distinct.append(rising)
                checked.append((valid, inverse))
        except Exception as error:  # sent to every rank, as all of them wait for this one
            failure = error
        found = self._exchange(distinct, failure)
        for lookup, (_, _, out), (ids, at), own in zip(
            self._row_wise, work, checked, found, strict=True
        ):
            parts = [rows_of(own[at]).t()]
            if lookup.rows_per_id == 2:
                # Helper rows are hashes, which every rank computes: codes alone are exchanged.
                parts.append(lookup.codes.helper_rows(ids) + lookup.codes.config.num_rows)
            rows = torch.stack(parts, dim=-1)
            out.view(rows.shape).copy_(rows)

    def _exchange(
        self, distinct: list[torch.Tensor], failure: Exception | None
    ) -> list[torch.Tensor]:
        """Whole codes [U, c] of the rising ids [U] of each table.

        Raises:
            ValueError: on every rank, if any has failed before.
        """
        by_rank, asked, answered = self._exchange_counts(distinct, failure)
        wanted = self._exchanged(torch.cat(by_rank), [sum(row) for row in asked], answered)
        replies = self._codes_of(wanted, answered)
        sizes = [lookup.bytes_per_id for lookup in self._row_wise]
        returned = [[n * s for n, s in zip(row, sizes, strict=True)] for row in asked]
        sent = [sum(n * s for n, s in zip(row, sizes, strict=True)) for row in answered]
        arrived = self._exchanged(replies, sent, returned).split(
            [n for row in returned for n in row]
        )
        return [
            torch.cat(arrived[t :: len(sizes)])
            .view(lookup.dtype)
            .view(-1, len(lookup.codes.chunks))
            for t, lookup in enumerate(self._row_wise)
        ]

    def _exchange_counts(
        self, distinct: list[torch.Tensor], failure: Exception | None
    ) -> tuple[list[torch.Tensor], list[list[int]], list[list[int]]]:
        """Ids to ask each rank for, in turn by table; how many, and how many others ask for here.

        A rank that has failed says so in its counts: the others wait for them.
        """
        # Not by `collectives.add_up`, which sends a number of its own: a collective more a batch.
        ranks, tables = dist.get_world_size(self._group), len(self._row_wise)
        device = self._row_wise[0].codes.clusterings.device
        counts = torch.full((ranks, tables), _FAILED, device=device)
        cuts: list[list[int]] = []
        if failure is None:
            each = [
                lookup.partition.cuts(rising)
                for lookup, rising in zip(self._row_wise, distinct, strict=True)
            ]
            counts = torch.stack([c.diff() for c in each], dim=1).contiguous()
            cuts = torch.stack(each).tolist()
        from_others = torch.empty_like(counts)
        dist.all_to_all_single(from_others, counts, group=self._group)
        asked, answered = counts.tolist(), from_others.tolist()
        if failure is not None:
            raise failure
        _raise_if_any_failed(answered)
        by_rank = [
            distinct[t][cuts[t][r] : cuts[t][r + 1]] for r in range(ranks) for t in range(tables)
        ]
        return by_rank, asked, answered

    def _exchanged(
        self, values: torch.Tensor, to_each: list[int], from_each: list[list[int]]
    ) -> torch.Tensor:
        """What the other ranks send when this one sends `values`, by counts."""
        received = [sum(row) for row in from_each]
        out = values.new_empty(sum(received))
        dist.all_to_all_single(out, values, received, to_each, group=self._group)
        return out

    def _codes_of(self, wanted: torch.Tensor, counts: list[list[int]]) -> torch.Tensor:
        """Codes of the ids that other ranks ask for, as bytes in their order."""
        replies = list(wanted.split([n for row in counts for n in row]))
        tables = len(self._row_wise)
        for t, lookup in enumerate(self._row_wise):
            codes, size = lookup.codes, lookup.bytes_per_id
            own = torch.cat(replies[t::tables]) - codes.ids.start
            # Marked and counted when the batch is looked up, not here: see BatchInFlight.
            if codes.notes:
                self._answered.append((codes, own))
            # As bytes: gloo refuses int16, and tables of other types go along.
            found = lookup.codes_of(own).view(-1).view(torch.uint8)
            replies[t::tables] = found.split([row[t] * size for row in counts])
        return torch.cat(replies)


def _raise_if_any_failed(counts: list[list[int]]) -> None:
    failed = [rank for rank, row in enumerate(counts) if _FAILED in row]
    if failed:
        raise ValueError(f"the batch of ranks {failed} could not be looked up; see their error")
