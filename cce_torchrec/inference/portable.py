"""The lookup of packed tables in operators of torch and FBGEMM alone.

A process that has no more than these, and no Python, runs what TorchScript, torch.export and
AOTInductor record of it. All tables are looked up together, so that the number of operators does
not grow with theirs, and nothing is done that depends on how many ids a feature has.

1. Every id is checked, and becomes its table's.
2. It gets a row of numbers, one for each chunk: its codes, or hashes.
3. These are put in the order of FBGEMM's tables, which are the chunks of features; and looked up.
"""

# No annotations as strings: TorchScript reads those of classes, as types.

from typing import Final

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation

from cce_torchrec.inference.lookup import PackedLookup
from cce_torchrec.inference.packed_tables import PackedTables
from cce_torchrec.inference.row_types import ROW_TYPES
from cce_torchrec.torchrec_internals import assert_in_graph


def mixed(ids: torch.Tensor) -> torch.Tensor:
    """What `codes.hashing.mix` gives, as TorchScript can read it."""
    z = (ids ^ ((ids >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return z ^ ((z >> 31) & 0x1FFFFFFFF)


def hashed(mix: torch.Tensor, hashes: torch.Tensor, num_rows: torch.Tensor) -> torch.Tensor:
    """Rows in [0, num_rows) [V, c] of ids `mix` [V], by `hashes` [V, 2, c]; `num_rows` is [V]."""
    bits = (mix.unsqueeze(1) * hashes.select(1, 0) + hashes.select(1, 1)) >> 33
    return ((bits & 0x7FFFFFFF) * num_rows.unsqueeze(1)) >> 31


class PortableLookup(PackedLookup):
    """See `PackedLookup`."""

    # By which TorchScript leaves out what no table needs.
    has_codes: Final[bool]
    has_hashes: Final[bool]
    has_helpers: Final[bool]
    has_raw_ids: Final[bool]
    has_means: Final[bool]
    one_feature: Final[bool]
    same_inputs: Final[bool]
    same_reads: Final[bool]
    num_chunks: Final[int]

    # Of features.
    num_ids: torch.Tensor
    first_id: torch.Tensor
    raw_key: torch.Tensor
    is_raw: torch.Tensor
    input_of_feature: torch.Tensor
    is_mean: torch.Tensor
    dims: torch.Tensor
    first_bit: torch.Tensor
    code_bits: torch.Tensor
    id_bits: torch.Tensor
    code_mask: torch.Tensor
    num_rows: torch.Tensor
    helper_rows: torch.Tensor
    is_hashed: torch.Tensor
    reads: torch.Tensor

    # Of chunks of features, FBGEMM's tables.
    feature_of_chunk: torch.Tensor
    column_of_chunk: torch.Tensor
    first_row: torch.Tensor
    row_types: torch.Tensor
    places: torch.Tensor
    dim_ends: torch.Tensor
    no_rows: torch.Tensor

    def __init__(self, packed: PackedTables, ignores: bool = False) -> None:
        super().__init__(packed, ignores)
        features, tables = packed.features, packed.tables_of_features
        self.has_codes = any(table.code_bits > 0 for table in tables)
        self.has_hashes = any(table.is_hashed for table in tables)
        self.has_helpers = any(table.helper_rows > 0 for table in tables)
        self.has_raw_ids = any(feature.raw_key is not None for feature in features)
        self.has_means = any(feature.mean for feature in features)
        inputs = [packed.inputs.index(feature.feature) for feature in features]
        self.one_feature = len(features) == 1
        self.same_inputs = inputs == list(range(len(inputs)))
        self.same_reads = len({table.rows_per_id for table in tables}) == 1
        self.num_chunks = max(table.num_chunks for table in tables)
        ranges = zip(self.names, features, strict=True)
        # Of exported programs, which know no more than that some id is bad.
        self.message = "an id is out of bounds; ids are " + ", ".join(
            f"[0, {len(feature.ids)}) of {name}" for name, feature in ranges
        )
        starts = [8 * packed.code_starts[feature.table] for feature in features]
        numbers = {
            "num_ids": [len(feature.ids) for feature in features],
            "first_id": [feature.ids.start for feature in features],
            "raw_key": [feature.raw_key or 0 for feature in features],
            "is_raw": [feature.raw_key is not None for feature in features],
            "input_of_feature": inputs,
            "is_mean": [feature.mean for feature in features],
            "dims": [table.dim for table in tables],
            "first_bit": starts,
            "code_bits": [table.code_bits for table in tables],
            "id_bits": [table.code_bits * table.num_chunks for table in tables],
            "code_mask": [(1 << table.code_bits) - 1 for table in tables],
            "num_rows": [table.num_rows for table in tables],
            "helper_rows": [max(1, table.helper_rows) for table in tables],
            "is_hashed": [table.is_hashed for table in tables],
            "reads": [table.rows_per_id for table in tables],
        }
        for name, own in numbers.items():
            self.register_buffer(name, torch.tensor(own))
        self._describe_chunks(packed)

    def _describe_chunks(self, packed: PackedTables) -> None:
        """Buffers of what FBGEMM is told of its tables."""
        numbers: list[list[int]] = []
        dims, starts = [0], packed.row_starts
        for i, table in enumerate(packed.tables_of_features):
            start, size = starts[packed.features[i].table], table.row_bytes // table.num_chunks
            for chunk in range(table.num_chunks):
                numbers.append([i, chunk, start + chunk * size, table.row_type.number])
                dims.append(dims[-1] + table.chunk_dim)
        of_feature, column, first, types = torch.tensor(numbers).t().contiguous()
        places = torch.full((len(types),), EmbeddingLocation.HOST.value, dtype=torch.int32)
        self.register_buffer("feature_of_chunk", of_feature)
        self.register_buffer("column_of_chunk", column)
        self.register_buffer("first_row", first)
        self.register_buffer("row_types", types.to(torch.uint8))
        self.register_buffer("places", places)
        self.register_buffer("dim_ends", torch.tensor(dims, dtype=torch.int32))
        self.register_buffer("no_rows", torch.zeros(0, dtype=torch.uint8))
        # The widest chunk of each type.
        self.fp32, self.fp16, self.int8, self.int4 = (
            max((t.chunk_dim for t in packed.tables if t.row_type.name == name), default=0)
            for name in ROW_TYPES
        )

    def forward(
        self, values: torch.Tensor, lengths: torch.Tensor, weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See `PackedLookup`."""
        lengths = lengths.long().view(self.num_inputs, -1)
        if not self.same_inputs:
            source = self._source(lengths.sum(1))
            values = values.index_select(0, source)
            lengths = lengths.index_select(0, self.input_of_feature)
            if weights is not None:
                weights = weights.index_select(0, source)
        counts = lengths.sum(1)
        feature = counts
        if not self.one_feature:
            feature = torch.repeat_interleave(counts, output_size=values.size(0))
        ids = self._checked(values.long(), feature)
        main, helper = self._rows(ids, feature)
        rows, of_id = self._in_order(main, helper, counts)
        reads = (lengths * self.reads.unsqueeze(1)).index_select(0, self.feature_of_chunk)
        # Not padded by `pad`, which a compiled package gets wrong for a batch without bags.
        ends = torch.cat([reads.new_zeros(1), reads.view(-1).cumsum(0)])
        pooled = torch.ops.fbgemm.int_nbit_split_embedding_codegen_lookup_function(
            self.rows, self.no_rows, self.places, self.first_row, self.row_types,
            self.dim_ends, self.total_dim, 0, self.int4, self.int8, self.fp16, self.fp32,
            rows, ends, 0, None if weights is None else weights.index_select(0, of_id), 0,
            None, None, 1,
        )  # fmt: skip
        if self.has_means:
            ones = torch.ones_like(lengths)
            bags = torch.where(self.is_mean.unsqueeze(1), lengths.clamp(min=1), ones).t()
            pooled = pooled / bags.repeat_interleave(self.dims, dim=1, output_size=self.total_dim)
        return pooled

    def _source(self, counts: torch.Tensor) -> torch.Tensor:
        """Where in a batch of `counts` ids the ids of the output's features are."""
        starts = (counts.cumsum(0) - counts).index_select(0, self.input_of_feature)
        own = counts.index_select(0, self.input_of_feature)
        moved = (starts - (own.cumsum(0) - own)).repeat_interleave(own)
        return moved + torch.arange(moved.size(0), device=moved.device)

    def _of(self, numbers: torch.Tensor, feature: torch.Tensor) -> torch.Tensor:
        """Of each id what `numbers` say of its feature, or a single one of all."""
        return numbers if self.one_feature else numbers.index_select(0, feature)

    def _checked(self, ids: torch.Tensor, feature: torch.Tensor) -> torch.Tensor:
        """The tables' ids of the features' `ids`."""
        sizes = self._of(self.num_ids, feature)
        if self.has_raw_ids:
            bits = (mixed(ids ^ self._of(self.raw_key, feature)) >> 1) & 0x7FFFFFFFFFFFFFFF
            ids = torch.where(self._of(self.is_raw, feature), bits % sizes, ids)
        bad = (ids < 0) | (ids >= sizes)
        if self.ignores:
            ids = ids.masked_fill(bad, 0)
        elif torch.jit.is_scripting():
            self._refuse(ids, bad, feature)
        elif torch.compiler.is_compiling():
            assert_in_graph(~bad.any(), self.message)
        else:
            self._refuse(ids, bad, feature)
        return ids + self._of(self.first_id, feature)

    def _refuse(self, ids: torch.Tensor, bad: torch.Tensor, feature: torch.Tensor) -> None:
        """Raises ValueError if any of `ids` is `bad`, naming the first one."""
        if bool(bad.any()):
            at = int(bad.int().argmax())
            own = 0 if self.one_feature else int(feature[at])
            name, first, size = self.names[own], int(ids[at]), int(self.num_ids[own])
            raise ValueError(
                f"{name}: id {first} is outside [0, {size}); map the ids into range, or export "
                "with ignores=True, which reads id 0 instead"
            )

    def _rows(self, ids: torch.Tensor, feature: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Main rows [V, c] and helper rows [V, c], if any table has some."""
        main = ids.unsqueeze(1).expand(-1, self.num_chunks)
        helper = main
        if self.has_codes:
            coded = self._of(self.code_bits, feature) > 0
            main = torch.where(coded.unsqueeze(1), self._codes(ids, feature), main)
        if self.has_hashes or self.has_helpers:
            mix, hashes = mixed(ids), self._of(self.hashes, feature)
            num_rows = self._of(self.num_rows, feature)
            if self.has_hashes:
                by_hash = hashed(mix, hashes.narrow(1, 0, 2), num_rows)
                main = torch.where(self._of(self.is_hashed, feature).unsqueeze(1), by_hash, main)
            if self.has_helpers:
                helper = hashed(mix, hashes.narrow(1, 2, 2), self._of(self.helper_rows, feature))
                helper = helper + num_rows.unsqueeze(1)
        return main, helper

    def _codes(self, ids: torch.Tensor, feature: torch.Tensor) -> torch.Tensor:
        """Codes of `ids` [V, c]; of tables without any whatever is there."""
        bits = self._of(self.code_bits, feature).unsqueeze(1)
        first = self._of(self.first_bit, feature) + ids * self._of(self.id_bits, feature)
        bit = first.unsqueeze(1) + torch.arange(self.num_chunks, device=ids.device) * bits
        word = (bit >> 5).view(-1)
        # Two words hold every code, of 32 bits at most.
        lower = self.codes.index_select(0, word).long() & 0xFFFFFFFF
        upper = self.codes.index_select(0, word + 1).long() << 32
        both = (lower | upper).view(-1, self.num_chunks)
        return (both >> (bit & 31)) & self._of(self.code_mask, feature).unsqueeze(1)

    def _in_order(
        self, main: torch.Tensor, helper: torch.Tensor, counts: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """All rows by feature, chunk, id and kind, and of which id [V] each of them is."""
        chunk = counts
        if self.one_feature:
            of_id = torch.arange(main.size(0), device=main.device).repeat(self.num_chunks)
            main, helper = main.t().reshape(-1), helper.t().reshape(-1)
        else:
            own = counts.index_select(0, self.feature_of_chunk)
            starts = (counts.cumsum(0) - counts).index_select(0, self.feature_of_chunk)
            moved = starts - (own.cumsum(0) - own)
            chunk = torch.repeat_interleave(own)
            of_id = torch.arange(chunk.size(0), device=own.device) + moved.index_select(0, chunk)
            at = of_id * self.num_chunks + self.column_of_chunk.index_select(0, chunk)
            main = main.reshape(-1).index_select(0, at)
            if self.has_helpers:
                helper = helper.reshape(-1).index_select(0, at)
        if not self.has_helpers:
            return main, of_id
        rows = torch.stack([main, helper], dim=1).view(-1)
        of_id = of_id.repeat_interleave(2)
        if not self.same_reads:
            two = (self.reads == 2).index_select(0, self.feature_of_chunk).index_select(0, chunk)
            kept = torch.stack([torch.ones_like(two), two], dim=1).view(-1)
            rows, of_id = rows[kept], of_id[kept]
        return rows, of_id
