"""The lookup of packed tables in operators of torch and FBGEMM alone.

A process that has no more than these, and no Python, runs what TorchScript, torch.export and
AOTInductor record of it. All tables are looked up together, so that the number of operators does
not grow with theirs, and nothing is done that depends on how many ids a feature has.

1. Every id is checked, and becomes its table's.
2. It gets a row of numbers, one for each chunk: its codes, or hashes.
3. These are put in the order of FBGEMM's tables, which are the chunks of features; and looked up.
"""

from __future__ import annotations

from typing import Optional

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation

from cce_torchrec.inference.lookup import Column, PackedLookup
from cce_torchrec.inference.packed_tables import PackedTable, PackedTables




def mixed(ids: torch.Tensor) -> torch.Tensor:
    """What `codes.hashing.mix` gives, as TorchScript can read it."""
    z = (ids ^ ((ids >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return z ^ ((z >> 31) & 0x1FFFFFFFF)


def hashed(mixed: torch.Tensor, hashes: torch.Tensor, num_rows: torch.Tensor) -> torch.Tensor:
    """Rows in [0, num_rows) [V, c] of `mixed` ids [V], by `hashes` [V, 2, c]; `num_rows` is [V]."""
    bits = (mixed.unsqueeze(1) * hashes.select(1, 0) + hashes.select(1, 1)) >> 33
    return ((bits & 0x7FFFFFFF) * num_rows.unsqueeze(1)) >> 31


class PortableLookup(PackedLookup):
    """See `PackedLookup`."""

    # By which TorchScript leaves out what no table needs.
    __constants__ = (
        *PackedLookup.__constants__,
        "has_codes",
        "has_hashes",
        "has_helpers",
        "has_raw_ids",
        "has_means",
        "one_feature",
        "same_inputs",
        "same_reads",
        "num_chunks",
    )

    def __init__(self, packed: PackedTables, ignores: bool = False) -> None:
        super().__init__(packed, ignores)
        features = packed.features
        tables = [packed.tables[feature.table] for feature in features]
        self.has_codes = any(table.code_bits > 0 for table in tables)
        self.has_hashes = any(not table.code_bits and not table.plain for table in tables)
        self.has_helpers = any(table.helper_rows > 0 for table in tables)
        self.has_raw_ids = any(feature.raw_key is not None for feature in features)
        self.has_means = any(feature.mean for feature in features)
        inputs = [packed.inputs.index(feature.feature) for feature in features]
        self.same_inputs = inputs == list(range(len(inputs)))
        self.same_reads = len({table.rows_per_id for table in tables}) == 1
        self.num_chunks = max(table.num_chunks for table in tables)
        self.one_feature = len(features) == 1
        # By column, each of which lookups read by itself.
        own = self.numbers.t().contiguous()
        self.register_buffer("numbers_of", own)
        self.register_buffer("input_of_feature", torch.tensor(inputs))
        self.register_buffer("dims", torch.tensor([table.dim for table in tables]))
        self.register_buffer("means", torch.tensor([feature.mean for feature in features]))
        self._add_chunks(packed, tables)

    def _add_chunks(self, packed: PackedTables, tables: list[PackedTable]) -> None:
        """Buffers of what FBGEMM is told of its tables."""
        chunks: list[tuple[int, int, int, int]] = []
        dims, widest, starts = [0], dict.fromkeys(("fp32", "fp16", "int8", "int4"), 0), packed.row_starts
        for number, (feature, table) in enumerate(zip(packed.features, tables, strict=True)):
            size, kind = table.row_bytes // table.num_chunks, table.row_type
            for chunk in range(table.num_chunks):
                start = starts[feature.table] + chunk * size
                chunks.append((number, chunk, start, kind.sparse_type.as_int()))
                dims.append(dims[-1] + table.chunk_dim)
            widest[kind.name] = max(widest[kind.name], table.chunk_dim)
        described = torch.tensor(chunks)
        self.register_buffer("feature_of_chunk", described[:, 0].contiguous())
        self.register_buffer("column_of_chunk", described[:, 1].contiguous())
        self.register_buffer("row_starts", described[:, 2].contiguous())
        self.register_buffer("row_types", described[:, 3].to(torch.uint8))
        places = torch.full((len(chunks),), EmbeddingLocation.HOST.value, dtype=torch.int32)
        self.register_buffer("places", places)
        self.register_buffer("ends_of_dims", torch.tensor(dims, dtype=torch.int32))
        self.register_buffer("no_rows", torch.zeros(0, dtype=torch.uint8))
        self.fp32, self.fp16 = widest["fp32"], widest["fp16"]
        self.int8, self.int4 = widest["int8"], widest["int4"]

    def forward(
        self,
        values: torch.Tensor,
        lengths: torch.Tensor,
        weights: Optional[torch.Tensor] = None,  # noqa: UP045  # TorchScript reads no other form
    ) -> torch.Tensor:
        """Pooled embeddings float32 [B, sum of D].

        Args:
            values: ids [V], int32 or int64, those of one feature after those of another.
            lengths: of bags [features * B].
            weights: of ids, float32 [V].
        """
        lengths = lengths.long().view(self.num_inputs, -1)
        source = self._source(lengths)
        if source is not None:
            values, lengths = values.index_select(0, source), lengths.index_select(0, self.input_of_feature)
            if weights is not None:
                weights = weights.index_select(0, source)
        counts = lengths.sum(1)
        feature, numbers = counts, self.numbers_of
        if not self.one_feature:
            feature = torch.repeat_interleave(counts, output_size=values.size(0))
            numbers = numbers.index_select(1, feature)
        ids = self._checked(values.long(), feature, numbers)
        main, helper = self._rows(ids, feature, numbers)
        rows, of_id = self._in_order(main, helper, counts)
        reads = lengths * self.numbers.select(1, Column.READS.value).unsqueeze(1)
        ends = reads.index_select(0, self.feature_of_chunk).view(-1).cumsum(0)
        # Not by `pad`, which a compiled package gets wrong for a batch without bags.
        ends = torch.cat([ends.new_zeros(1), ends])
        pooled = torch.ops.fbgemm.int_nbit_split_embedding_codegen_lookup_function(
            self.rows, self.no_rows, self.places, self.row_starts, self.row_types,
            self.ends_of_dims, self.total_dim, 0, self.int4, self.int8, self.fp16, self.fp32,
            rows, ends, 0,
            None if weights is None else weights.index_select(0, of_id), 0, None, None, 1,
        )  # fmt: skip
        if self.has_means:
            ones = torch.ones_like(lengths)
            divisors = torch.where(self.means.unsqueeze(1), lengths.clamp(min=1), ones).t()
            wide = divisors.repeat_interleave(self.dims, dim=1, output_size=self.total_dim)
            pooled = pooled / wide
        return pooled

    def _source(self, lengths: torch.Tensor) -> Optional[torch.Tensor]:  # noqa: UP045
        """Where in the batch the ids of the output's features are; None: in this order."""
        if self.same_inputs:
            return None
        counts = lengths.sum(1)
        starts = (counts.cumsum(0) - counts).index_select(0, self.input_of_feature)
        counts = counts.index_select(0, self.input_of_feature)
        moved = (starts - (counts.cumsum(0) - counts)).repeat_interleave(counts)
        return moved + torch.arange(moved.size(0), device=moved.device)

    def _checked(
        self, ids: torch.Tensor, feature: torch.Tensor, numbers: torch.Tensor
    ) -> torch.Tensor:
        """The tables' ids of the features' `ids`."""
        sizes = numbers.select(0, Column.IDS.value)
        if self.has_raw_ids:
            own = ((mixed(ids ^ numbers.select(0, Column.RAW_KEY.value)) >> 1) & 0x7FFFFFFFFFFFFFFF) % sizes
            ids = torch.where(numbers.select(0, Column.IS_RAW.value) != 0, own, ids)
        bad = (ids < 0) | (ids >= sizes)
        if self.ignores:
            ids = ids.masked_fill(bad, 0)
        elif torch.jit.is_scripting():
            self._refuse(ids, bad, feature, sizes)
        elif torch.compiler.is_compiling():
            # Kept by exported programs, which raise nothing of their own.
            torch._assert_async(~bad.any(), "an id is outside of the ids of its table")
        else:
            self._refuse(ids, bad, feature, sizes)
        return ids + numbers.select(0, Column.FIRST_ID.value)

    def _refuse(
        self, ids: torch.Tensor, bad: torch.Tensor, feature: torch.Tensor, sizes: torch.Tensor
    ) -> None:
        """Raises ValueError if any of `ids` is `bad`, naming the first one."""
        if bool(bad.any()):
            at = int(bad.int().argmax())
            name, first, size = self.names[0], int(ids[at]), int(sizes[0])
            if not self.one_feature:
                name, size = self.names[int(feature[at])], int(sizes[at])
            raise ValueError(
                f"{name}: id {first} is outside [0, {size}); map the ids into range, or export "
                "with ignores=True, which reads id 0 instead"
            )

    def _rows(
        self, ids: torch.Tensor, feature: torch.Tensor, numbers: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Main rows [V, c] and helper rows [V, c], if any table has some."""
        main = ids.unsqueeze(1).expand(-1, self.num_chunks)
        helper = main
        if self.has_codes:
            main = torch.where((numbers.select(0, Column.CODE_BITS.value) != 0).unsqueeze(1), self._codes(ids, numbers), main)
        if self.has_hashes or self.has_helpers:
            mix, hashes = mixed(ids), self.hashes
            if not self.one_feature:
                hashes = hashes.index_select(0, feature)
            if self.has_hashes:
                by_hash = hashed(mix, hashes.narrow(1, 0, 2), numbers.select(0, Column.NUM_ROWS.value))
                main = torch.where((numbers.select(0, Column.IS_HASHED.value) != 0).unsqueeze(1), by_hash, main)
            if self.has_helpers:
                helper = hashed(mix, hashes.narrow(1, 2, 2), numbers.select(0, Column.HELPER_ROWS.value))
                helper = helper + numbers.select(0, Column.NUM_ROWS.value).unsqueeze(1)
        return main, helper

    def _codes(self, ids: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """Packed codes of `ids` [V, c]; of tables without any whatever is there."""
        bits, first = numbers.select(0, Column.CODE_BITS.value), numbers.select(0, Column.FIRST_CODE_BYTE.value)
        first = first * 8 + ids * bits * numbers.select(0, Column.NUM_CHUNKS.value)
        columns = torch.arange(self.num_chunks, device=ids.device)
        bit = first.unsqueeze(1) + columns * bits.unsqueeze(1)
        word, low = (bit >> 5).view(-1), bit & 31
        # Two words hold every code, of 32 bits at most.
        lower = self.codes.index_select(0, word).long() & 0xFFFFFFFF
        upper = self.codes.index_select(0, word + 1).long() << 32
        masks = numbers.select(0, Column.CODE_MASK.value).unsqueeze(1)
        return ((lower | upper).view(-1, self.num_chunks) >> low) & masks

    def _in_order(
        self, main: torch.Tensor, helper: torch.Tensor, counts: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """All rows by feature, chunk, id and kind, and of which id [V] each of them is."""
        if self.one_feature:
            of_id = torch.arange(main.size(0), device=main.device).repeat(self.num_chunks)
            rows = main.t().reshape(-1)
            if self.has_helpers:
                rows = torch.stack([rows, helper.t().reshape(-1)], dim=1).view(-1)
                of_id = of_id.repeat_interleave(2)
            return rows, of_id
        own = counts.index_select(0, self.feature_of_chunk)
        starts = (counts.cumsum(0) - counts).index_select(0, self.feature_of_chunk)
        moved = starts - (own.cumsum(0) - own)
        chunk = torch.repeat_interleave(own)
        of_id = torch.arange(chunk.size(0), device=own.device) + moved.index_select(0, chunk)
        at = of_id * self.num_chunks + self.column_of_chunk.index_select(0, chunk)
        rows = main.reshape(-1).index_select(0, at)
        if not self.has_helpers:
            return rows, of_id
        rows = torch.stack([rows, helper.reshape(-1).index_select(0, at)], dim=1).view(-1)
        of_id = of_id.repeat_interleave(2)
        if not self.same_reads:
            two = self.numbers.select(1, Column.READS.value).index_select(0, self.feature_of_chunk) == 2
            two = two.index_select(0, chunk)
            kept = torch.stack([torch.ones_like(two), two], dim=1).view(-1)
            rows, of_id = rows[kept], of_id[kept]
        return rows, of_id
