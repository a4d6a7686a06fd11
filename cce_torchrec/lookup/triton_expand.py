"""Launches the kernels of triton_kernel.py on the tables of a lookup."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton

from cce_torchrec.codes.counts import LEVELS, chances
from cce_torchrec.gpu.launch import launch
from cce_torchrec.lookup import triton_kernel as kernels
from cce_torchrec.lookup.triton_count import count_ids

_VALUES, _WARPS = 512, 8
"""Ids of a program and its warps. On an H100 others of 128 to 512 ids took as long for one table
and up to 14 % longer for 26; 1,024 ids or more, in an earlier form, up to three times as long."""
_BAGS = 2048


class Lookup:
    """The tables of a lookup, described on their device.

    Args:
        tables: TABLE_FIELDS numbers for each table.
        chunks: CHUNK_FIELDS numbers for each chunk of the tables in turn.
        features: FEATURE_FIELDS numbers for each physical feature.
        table_of: table of each logical feature.
        device: where ids will be.
    """

    def __init__(
        self,
        tables: Sequence[Sequence[int]],
        chunks: Sequence[Sequence[int]],
        features: Sequence[Sequence[int]],
        table_of: Sequence[int],
        device: torch.device,
    ) -> None:
        flat = [list(itertools.chain.from_iterable(part)) for part in (tables, chunks, features)]
        # One tensor, as a launch takes the host longer the more pointers it has.
        numbers = [*flat[0], *flat[1], *flat[2], *table_of, *chances()]
        self.numbers = torch.tensor(numbers, device=device)
        """int64: what describes tables, chunks, features, the table of each logical one, and the
        chances of counts."""
        self.chances_at = len(numbers) - LEVELS
        self.places = tuple(itertools.accumulate(map(len, flat)))
        """Where chunks, features and the tables of logical features start in `numbers`."""
        self.num_tables, self.num_features = len(tables), len(table_of)
        self.num_out_features = len(features)
        self.padded_features = triton.next_power_of_2(self.num_features)
        self.most_chunks = max(table[8] for table in tables)
        self.most_copies = max(table[13] for table in tables)
        """Rows per id of the table that has most of them."""
        self.alike = len({table[13] for table in tables}) == 1
        """Whether all tables have as many rows per id, all chunks together."""
        bits = {table[2] for table in tables}
        self.code_bits = max(0, *bits) if len(bits) == 1 else 0
        """Of every table, or 0 where they differ or some have no codes."""
        self.row_bytes = _row_bytes(tables) if self.code_bits else 0
        self.raw = any(table[10] for table in tables)
        self.mark = any(table[12] for table in tables)
        self.counts = any(table[16] for table in tables)
        self.pairs = all(table[5] for table in tables)
        """Whether every table has helper rows: two rows per id and chunk."""


def _row_bytes(tables: Sequence[Sequence[int]]) -> int:
    """Bytes of a row of packed codes, if they are one word in memory in every table; else 0."""
    found = {table[3] for table in tables}
    size = found.pop()
    # A GPU loads a word only from an address that its size divides.
    aligned = all(table[1] % size == 0 for table in tables)
    return size if not found and aligned and size in (1, 2, 4, 8) else 0


@dataclass(frozen=True)
class Bags:
    """The bags of a batch: `stride` of every feature, or else as many as the starts say."""

    offsets: torch.Tensor
    """int32 or int64 [bags + 1], of all features' bags one after the other."""
    stride: int
    starts: torch.Tensor | None = None
    """int64 [F + 1], where the bags of each feature start, where they differ in number."""
    out_starts: torch.Tensor | None = None
    """int64 [P + 1], likewise of each physical feature."""
    num_out: int = 0
    """Bags of all physical features."""


def expand(
    lookup: Lookup,
    ids: torch.Tensor,
    weights: torch.Tensor | None,
    bags: Bags,
    *,
    out: torch.Tensor,
    out_weights: torch.Tensor | None,
    offsets: torch.Tensor,
    invalid: torch.Tensor | None,
    first_bad: torch.Tensor | None,
    exact: bool,
) -> None:
    """Writes the rows of `ids` into `out`, their weights, and the offsets of their bags.

    Args:
        lookup: the tables.
        ids: int32 or int64 [V]; those out of bounds are read as 0.
        weights: [V], or None.
        bags: of ids.
        out: int64 or int32; per table [chunks, its ids, rows per id].
        out_weights: like `out`, of the type of `weights`, or None.
        offsets: int64 or int32 [bags of all physical features + 1], in the order of their rows.
        invalid: int64 [T]; ids out of bounds are added per table. None: they are not counted.
        first_bad: int64 [T]; takes the lowest position in `ids` of one out of bounds, or None.
        exact: whether `out` has as many rows as all bags, by lengths that the host knows. A batch
            whose features do not rise, or have more rows, is read as row 0 in the last bag; it
            counts as a bad id, or has a first one at -1.
    """
    variable = bags.starts is not None
    starts, out_starts, step = None, None, bags.stride
    # Otherwise both follow from the offsets of the batch, which spares a launch.
    if variable or not lookup.alike:
        starts, out_starts = _find_starts(lookup, bags)
        step = 1
    num_values = ids.numel()
    row_programs = -(-num_values // _VALUES)  # triton.cdiv takes the host microseconds
    long = bags.stride >= _BAGS  # then a program has bags of one feature, and reads its fields once
    bag_programs = (
        lookup.num_out_features * -(-bags.stride // _BAGS)
        if long
        else max(1, -(-bags.num_out // _BAGS))
    )
    # With many ids for each table, most programs have ids of one table and read its fields once;
    # with few, each id looks for its own.
    launch(
        kernels.expand, (row_programs + bag_programs,),
        ids, weights, bags.offsets, bags.starts, bags.out_starts, starts, out_starts,
        lookup.numbers, out, out_weights, offsets, invalid, first_bad, *lookup.places, num_values,
        out.numel(), lookup.num_features, lookup.num_out_features, lookup.num_tables, bags.num_out,
        bags.stride, step, row_programs, lookup.most_copies,
        FEATURES=lookup.padded_features, EXACT=exact,
        CHUNKS=lookup.most_chunks, STEPS=lookup.num_features.bit_length(),
        BAG_STEPS=lookup.num_out_features.bit_length() if variable else 0,
        VALUES=_VALUES, BAGS=_BAGS, CODE_BITS=lookup.code_bits, ROW_BYTES=lookup.row_bytes,
        RAW=lookup.raw, MARK=lookup.mark, PAIRS=lookup.pairs,
        TABLE_BY_TABLE=num_values >= lookup.num_tables * _VALUES, LONG=long,
        TABLE_FIELDS=kernels.TABLE_FIELDS, CHUNK_FIELDS=kernels.CHUNK_FIELDS,
        FEATURE_FIELDS=kernels.FEATURE_FIELDS,
        num_warps=_WARPS,
    )  # fmt: skip
    if lookup.counts:
        _count(lookup, ids, bags, starts, step)


def _count(
    lookup: Lookup, ids: torch.Tensor, bags: Bags, starts: torch.Tensor | None, step: int
) -> None:
    count_ids(
        ids,
        bags.offsets if starts is None else starts,
        step,
        lookup.numbers,
        table_of_at=lookup.places[2],
        chances_at=lookup.chances_at,
        num_features=lookup.num_features,
        table_fields=kernels.TABLE_FIELDS,
    )


def _find_starts(lookup: Lookup, bags: Bags) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each feature's ids start [F + 1] and each table's rows [T + 1], both int64."""
    num_features, num_tables = lookup.num_features, lookup.num_tables
    new = functools.partial(torch.empty, dtype=torch.int64, device=bags.offsets.device)
    starts, out_starts = new(num_features + 1), new(num_tables + 1)
    launch(
        kernels.starts, (1,),
        bags.offsets, bags.offsets if bags.starts is None else bags.starts, lookup.numbers, starts,
        out_starts, num_features, num_tables, bags.stride,
        FEATURES=triton.next_power_of_2(num_features + 1),
        TABLES=triton.next_power_of_2(num_tables), TABLE_FIELDS=kernels.TABLE_FIELDS,
        VARIABLE=bags.starts is not None,
    )  # fmt: skip
    return starts, out_starts
