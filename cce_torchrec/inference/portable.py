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

from cce_torchrec.inference.lookup import PackedLookup, check_weights, refuse_cuda, reordered
from cce_torchrec.inference.packed_tables import PackedTables
from cce_torchrec.inference.row_types import ROW_TYPES
from cce_torchrec.torchrec_internals import assert_in_graph


def mixed(ids: torch.Tensor) -> torch.Tensor:
    """What `codes.hashing.mix` gives, as TorchScript can read it."""
    # Its multipliers as signed integers, and masks that keep the sign bit from being shifted in.
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
    is_rotated: Final[bool]
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
        numbers = [_numbers(packed, i) for i in range(len(packed.features))]
        for name in numbers[0]:
            self.register_buffer(name, torch.tensor([own[name] for own in numbers]))
        self.has_codes = bool(self.code_bits.any())
        self.has_hashes = bool(self.is_hashed.any())
        self.has_helpers = bool((self.reads == 2).any())
        self.has_raw_ids = bool(self.is_raw.any())
        self.has_means = bool(self.is_mean.any())
        self.one_feature = len(numbers) == 1
        self.is_rotated = any(feature.first_chunk for feature in packed.features)
        self.same_inputs = self.input_of_feature.tolist() == list(range(len(numbers)))
        self.same_reads = len(self.reads.unique()) == 1
        self.num_chunks = max(table.num_chunks for table in packed.tables_of_features)
        ranges = zip(self.names, self.num_ids.tolist(), strict=True)
        # Of exported programs, which know no more than that some id is bad.
        self.message = "an id is out of bounds; ids are " + ", ".join(
            f"[0, {count}) of {name}" for name, count in ranges
        )
        self._describe_chunks(packed)

    def _describe_chunks(self, packed: PackedTables) -> None:
        """Buffers of what FBGEMM is told of its tables."""
        numbers: list[list[int]] = []
        dims, starts = [0], packed.row_starts
        for i, table in enumerate(packed.tables_of_features):
            start, size = starts[packed.features[i].table], table.row_bytes // table.num_chunks
            first_chunk = packed.features[i].first_chunk
            for chunk in (*range(first_chunk, table.num_chunks), *range(first_chunk)):
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
        refuse_cuda(values, self.rows)
        check_weights(self.is_weighted, weights)
        if weights is not None:
            weights = weights.float()  # as FBGEMM reads them
        self._check(values, lengths, weights)
        lengths = lengths.long().view(self.num_inputs, -1)
        if not self.same_inputs:
            source = reordered(lengths, self.input_of_feature)
            values = values.index_select(0, source)
            lengths = lengths.index_select(0, self.input_of_feature)
            if weights is not None:
                weights = weights.index_select(0, source)
        counts = lengths.sum(1)
        # Not by one number for all of a single feature: programs would be made for two ids or more.
        if self.one_feature:
            feature = torch.zeros_like(values)
        else:
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
            # Not by FBGEMM's mean, which divides by rows.
            ones = torch.ones_like(lengths)
            bags = torch.where(self.is_mean.unsqueeze(1), lengths.clamp(min=1), ones).t()
            pooled = pooled / bags.repeat_interleave(self.dims, dim=1, output_size=self.total_dim)
        return pooled

    def _check(
        self, values: torch.Tensor, lengths: torch.Tensor, weights: torch.Tensor | None
    ) -> None:
        """Raises ValueError if a batch does not fit, by which FBGEMM would read other memory."""
        for given in (values, lengths):
            if given.dtype != torch.int32 and given.dtype != torch.int64:
                raise ValueError("values and lengths must be int32 or int64")
        if torch.jit.is_scripting():
            self._refuse_lengths(values, lengths, weights)
        elif torch.compiler.is_compiling():
            fits = (lengths >= 0).all() & (lengths.sum() == values.size(0))
            if weights is not None:  # counted, as a graph takes their number for that of the ids
                fits = fits & (torch.ones_like(weights).sum() == values.size(0))
            assert_in_graph(fits, "lengths are negative, or do not add up to the values")
        else:
            self._refuse_lengths(values, lengths, weights)

    def _refuse_lengths(
        self, values: torch.Tensor, lengths: torch.Tensor, weights: torch.Tensor | None
    ) -> None:
        count = values.size(0)
        if lengths.size(0) % self.num_inputs != 0:
            raise ValueError(
                f"{lengths.size(0)} lengths are no batch of {self.num_inputs} features"
            )
        # Each by itself, as a sum of huge ones may come out right.
        if bool((lengths < 0).any()) or bool((lengths > count).any()):
            raise ValueError(f"a length is negative, or more than the {count} values")
        total = int(lengths.sum())
        if total != count:
            raise ValueError(f"lengths add up to {total}, and {count} values were given")
        if weights is not None and weights.size(0) != count:
            raise ValueError(f"{weights.size(0)} weights for {count} values")

    def _checked(self, ids: torch.Tensor, feature: torch.Tensor) -> torch.Tensor:
        """The tables' ids of the features' `ids`."""
        sizes = self.num_ids.index_select(0, feature)
        if self.has_raw_ids:
            bits = (mixed(ids ^ self.raw_key.index_select(0, feature)) >> 1) & 0x7FFFFFFFFFFFFFFF
            ids = torch.where(self.is_raw.index_select(0, feature), bits % sizes, ids)
        bad = (ids < 0) | (ids >= sizes)
        if self.ignores:
            ids = ids.masked_fill(bad, 0)
        elif torch.jit.is_scripting():
            self._refuse(ids, bad, feature)
        elif torch.compiler.is_compiling():
            assert_in_graph(~bad.any(), self.message)
        else:
            self._refuse(ids, bad, feature)
        return ids + self.first_id.index_select(0, feature)

    def _refuse(self, ids: torch.Tensor, bad: torch.Tensor, feature: torch.Tensor) -> None:
        """Raises ValueError if any of `ids` is `bad`, naming the first one."""
        if bool(bad.any()):
            at = int(bad.int().argmax())
            own = int(feature[at])
            name, first, size = self.names[own], int(ids[at]), int(self.num_ids[own])
            raise ValueError(
                f"{name}: id {first} is outside [0, {size}); map the ids into range, or export "
                "with ignores=True, which reads id 0 instead"
            )

    def _rows(self, ids: torch.Tensor, feature: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Main rows [V, c] and helper rows [V, c], if any table has some."""
        main = ids.unsqueeze(1).expand(-1, self.num_chunks)  # of plain tables, whose rows are ids
        helper = main
        if self.has_codes:
            coded = self.code_bits.index_select(0, feature) > 0
            main = torch.where(coded.unsqueeze(1), self._codes(ids, feature), main)
        if self.has_hashes or self.has_helpers:
            mix, hashes = mixed(ids), self.hashes.index_select(0, feature)
            num_rows = self.num_rows.index_select(0, feature)
            if self.has_hashes:
                by_hash = hashed(mix, hashes.narrow(1, 0, 2), num_rows)
                own = self.is_hashed.index_select(0, feature).unsqueeze(1)
                main = torch.where(own, by_hash, main)
            if self.has_helpers:
                helper_rows = self.helper_rows.index_select(0, feature)
                helper = hashed(mix, hashes.narrow(1, 2, 2), helper_rows) + num_rows.unsqueeze(1)
        return main, helper

    def _codes(self, ids: torch.Tensor, feature: torch.Tensor) -> torch.Tensor:
        """Codes of `ids` [V, c]; of tables without any whatever is there."""
        bits = self.code_bits.index_select(0, feature).unsqueeze(1)
        first = ids * self.id_bits.index_select(0, feature)
        first = first + self.first_bit.index_select(0, feature)
        bit = first.unsqueeze(1) + torch.arange(self.num_chunks, device=ids.device) * bits
        word = (bit >> 5).view(-1)
        # Two words hold every code, of 32 bits at most.
        lower = self.codes.index_select(0, word).long() & 0xFFFFFFFF
        upper = self.codes.index_select(0, word + 1).long() << 32
        both = (lower | upper).view_as(bit)  # whose shape programs know to be the same
        return (both >> (bit & 31)) & self.code_mask.index_select(0, feature).unsqueeze(1)

    def _in_order(
        self, main: torch.Tensor, helper: torch.Tensor, counts: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """All rows by feature, chunk, id and kind, and of which id [V] each of them is."""
        chunk = counts
        if self.one_feature:
            of_id = torch.cat([torch.arange(main.size(0), device=main.device)] * self.num_chunks)
            if self.is_rotated:
                main = main.index_select(1, self.column_of_chunk)
                if self.has_helpers:
                    helper = helper.index_select(1, self.column_of_chunk)
            main = torch.cat(main.unbind(1))
            if self.has_helpers:
                helper = torch.cat(helper.unbind(1))
        else:
            # Of each chunk of a feature, the ids of the feature, wherever these begin.
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
            # Tables without a helper leave out what was made for theirs.
            two = (self.reads == 2).index_select(0, self.feature_of_chunk).index_select(0, chunk)
            kept = torch.stack([torch.ones_like(two), two], dim=1).view(-1)
            rows, of_id = rows[kept], of_id[kept]
        return rows, of_id


def _numbers(packed: PackedTables, number: int) -> dict[str, int | bool]:
    """What is said of the feature `number`, by the name of the buffer."""
    feature, table = packed.features[number], packed.tables_of_features[number]
    return {
        "num_ids": len(feature.ids),
        "first_id": feature.ids.start,
        "raw_key": feature.raw_key or 0,
        "is_raw": feature.raw_key is not None,
        "input_of_feature": packed.inputs.index(feature.feature),
        "is_mean": feature.mean,
        "dims": table.dim,
        "first_bit": 8 * packed.code_starts[feature.table],
        "code_bits": table.code_bits,
        "id_bits": table.code_bits * table.num_chunks,
        "code_mask": (1 << table.code_bits) - 1,
        "num_rows": table.num_rows,
        # Never 0, as all ids are hashed where those of any table are.
        "helper_rows": max(1, table.helper_rows),
        "is_hashed": table.is_hashed,
        "reads": table.rows_per_id,
    }
