"""Expansion in Triton: all tables, features, chunks and options of a lookup in one launch.

It compiles on CUDA, and under TRITON_INTERPRET=1 runs on the CPU, where tests compare it with the
torch form in expansion.py. Nothing here is read back by the host; triton_expand.py launches it.

- `expand`: some of its programs take a run of the batch's ids, find the table of each by a search
  in the features' starts, hash raw ids, check bounds, mark seen ids, and write rows (and weights)
  of all chunks. The others write the offsets of the bags of rows.
- `starts`, one program before it, only where tables differ in rows per id or features in bags:
  where each feature's ids start in the batch, and each table's rows in the output. Otherwise both
  follow from the offsets of the batch.

What a lookup does not need is None: each pointer that is passed costs the host time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cce_torchrec.gpu.triton_functions import (
    code_at,
    hashed,
    hashed_raw,
    last_at,
    mark_bits,
    mix,
    row_at,
)

TABLE_FIELDS = 19
"""int64 per table: ids, address of codes, bits of a code (0: hashed, -1: the id is the row), bytes
of a row of packed codes, main rows, helper rows, first feature, end of features, chunks, first
chunk, whether ids are raw, the key that raw ids are hashed with, address of the bits of seen ids
(0: they are not marked), rows per id of all chunks together; of a row of packed codes the
logarithm of its number of ids, and the bytes of a chunk; and of counts of ids their address (0:
they are not counted), that of the number of batches, and what the hash of a batch starts from."""
CHUNK_FIELDS = 5
"""int64 per chunk: column, multiplier and addend of the main hash, of the helper hash."""
FEATURE_FIELDS = 4
"""int64 per physical feature: the slot it reads, its table, its chunk in the table, rows per id."""


@triton.jit
def _first_bag(feature, bag_starts_ptr, stride, mask, VARIABLE: tl.constexpr):  # type: ignore[no-untyped-def]
    if VARIABLE:
        return tl.load(bag_starts_ptr + feature, mask=mask, other=0)
    else:
        return feature.to(tl.int64) * stride


@triton.jit
def _start(starts_ptr, feature, step):  # type: ignore[no-untyped-def]
    return tl.load(starts_ptr + feature.to(tl.int64) * step).to(tl.int64)


@triton.jit
def _out_start(out_starts_ptr, table, first, copies, ALIKE: tl.constexpr):  # type: ignore[no-untyped-def]
    if ALIKE:
        return first * copies
    else:
        return tl.load(out_starts_ptr + table)


@triton.jit(do_not_specialize=["num_features", "num_tables", "stride"])
def starts(  # type: ignore[no-untyped-def]
    offsets_ptr, bag_starts_ptr, tables_ptr, starts_ptr, out_starts_ptr, num_features, num_tables,
    stride, FEATURES: tl.constexpr, TABLES: tl.constexpr, TABLE_FIELDS: tl.constexpr,
    VARIABLE: tl.constexpr,
):  # fmt: skip
    """Where features start among the ids, and tables among the rows, both in one program."""
    feature = tl.arange(0, FEATURES)
    known = feature <= num_features
    bag = _first_bag(feature, bag_starts_ptr, stride, known, VARIABLE)
    start = tl.load(offsets_ptr + bag, mask=known, other=0)
    tl.store(starts_ptr + feature, start.to(tl.int64), mask=known)
    table = tl.arange(0, TABLES)
    real = table < num_tables
    field = tables_ptr + table * TABLE_FIELDS
    first = tl.load(field + 6, mask=real, other=0)
    last = tl.load(field + 7, mask=real, other=0)
    bag = _first_bag(last, bag_starts_ptr, stride, real, VARIABLE)
    ids = tl.load(offsets_ptr + bag, mask=real, other=0).to(tl.int64)
    bag = _first_bag(first, bag_starts_ptr, stride, real, VARIABLE)
    ids -= tl.load(offsets_ptr + bag, mask=real, other=0).to(tl.int64)
    ends = tl.cumsum(ids * tl.load(field + 13, mask=real, other=0), axis=0)
    tl.store(out_starts_ptr + 1 + table, ends, mask=real)
    tl.store(out_starts_ptr + table, tl.zeros((TABLES,), tl.int64), mask=table == 0)


@triton.jit
def _tables_of(  # type: ignore[no-untyped-def]
    begin, count, starts_ptr, lookup_ptr, table_of_at, num_features, step, STEPS: tl.constexpr
):
    # The first and the last table of `count` values from `begin` on.
    ends = begin + tl.arange(0, 2) * tl.maximum(count - 1, 0)
    feature = last_at(starts_ptr, step, ends, num_features, STEPS)
    table = tl.load(lookup_ptr + table_of_at + feature)
    return tl.min(table, axis=0), tl.max(table, axis=0)


@triton.jit
def _store(out_ptr, begins, at, main, helper, on, two, PAIRS: tl.constexpr):  # type: ignore[no-untyped-def]
    if PAIRS:  # both of an id at once; a table's rows begin at an even place
        pair = at[:, None] * 2 + tl.arange(0, 2)[None, :]
        begins = (begins // 2 * 2 + tl.zeros(at.shape, tl.int64))[:, None]
        tl.store(out_ptr + begins + pair, tl.join(main, helper), mask=on[:, None])
    else:
        to = begins + at * tl.where(two, 2, 1)
        tl.store(out_ptr + to, main, mask=on)
        tl.store(out_ptr + to + 1, helper, mask=on & two)


@triton.jit
def _checked(  # type: ignore[no-untyped-def]
    table, field, begin, at, ids, inside, invalid_ptr, first_bad_ptr, RAW: tl.constexpr
):
    # Raw ids hashed, and those out of bounds counted and read as 0.
    num_embeddings, zeros = tl.load(field), tl.zeros(at.shape, tl.int64)
    if RAW:
        raw = hashed_raw(ids, tl.load(field + 11), num_embeddings)
        ids = tl.where(tl.load(field + 10) != 0, raw, ids)
    bad = inside & ((ids < 0) | (ids >= num_embeddings))
    if invalid_ptr is not None:
        tl.atomic_add(invalid_ptr + table + zeros, zeros + 1, mask=bad, sem="relaxed")
    if first_bad_ptr is not None:
        tl.atomic_min(first_bad_ptr + table + zeros, begin + at, mask=bad, sem="relaxed")
    return tl.where(bad, 0, ids)


@triton.jit
def _rows(  # type: ignore[no-untyped-def]
    table, begin, count, ids, weights_ptr, starts_ptr, lookup_ptr, chunks_at, out_starts_ptr,
    out_ptr, out_weights_ptr, invalid_ptr, first_bad_ptr, step, CHUNKS: tl.constexpr,
    VALUES: tl.constexpr, CODE_BITS: tl.constexpr, ROW_BYTES: tl.constexpr, RAW: tl.constexpr,
    MARK: tl.constexpr, PAIRS: tl.constexpr, ALIKE: tl.constexpr, TABLE_FIELDS: tl.constexpr,
    CHUNK_FIELDS: tl.constexpr,
):  # fmt: skip
    # Writes the rows of those of `count` ids from `begin` on that are of `table`: a scalar, or the
    # table of each id.
    # Positions among them are int32, so that few instructions have 64 bits.
    field = lookup_ptr + table * TABLE_FIELDS
    first = _start(starts_ptr, tl.load(field + 6), step)
    last = _start(starts_ptr, tl.load(field + 7), step)
    at = tl.arange(0, VALUES)
    zeros = tl.zeros(at.shape, tl.int64)  # makes one number for all ids one for each
    inside = (at >= tl.maximum(first - begin, 0).to(tl.int32)) & (at < count)
    inside = inside & (at < tl.minimum(last - begin, VALUES).to(tl.int32))
    address = tl.load(field + 1)
    num_rows, helper_rows = tl.load(field + 4), tl.load(field + 5)
    num_chunks = tl.load(field + 8)
    chunks = lookup_ptr + chunks_at + tl.load(field + 9) * CHUNK_FIELDS

    ids = _checked(table, field, begin, at, ids, inside, invalid_ptr, first_bad_ptr, RAW)
    if MARK:
        seen = tl.load(field + 12)
        mark_bits(seen, ids, inside & (seen + zeros != 0))
    mixed = mix(ids)
    two = helper_rows + zeros > 0
    rows_per_id = tl.where(helper_rows > 0, 2, 1)
    begins = _out_start(out_starts_ptr, table, first, tl.load(field + 13), ALIKE)
    begins += (begin - first) * rows_per_id
    step_out = (last - first) * rows_per_id
    bits, shift, width = tl.load(field + 2), tl.load(field + 14), tl.load(field + 15)
    if CODE_BITS > 0:
        bits = bits * 0 + CODE_BITS  # of every table, and so a constant
    else:  # tables differ
        bits += zeros
    row = ids >> shift
    begin_bit = (ids & ((1 << shift) - 1)) * bits  # of an id's codes in the bytes of a chunk
    if ROW_BYTES > 0:
        codes = row_at(address, row, inside, ROW_BYTES)
    else:
        begin_bit += row * tl.load(field + 3) * 8
    if weights_ptr is not None:
        weights = tl.load(weights_ptr + begin + at, mask=inside, other=0)
    for j in range(CHUNKS):
        on = inside & (num_chunks + zeros > j)
        chunk = chunks + tl.minimum(j, num_chunks - 1) * CHUNK_FIELDS
        bit = begin_bit + tl.load(chunk) * width * 8
        if ROW_BYTES > 0:
            main = (codes >> bit) & ((1 << bits) - 1)
        elif CODE_BITS > 0:
            main = code_at(address, bit, bits, on)
        else:  # tables differ: in bits of a code, or some have none
            code = hashed(mixed, tl.load(chunk + 1), tl.load(chunk + 2), num_rows)
            main = code_at(address, bit, tl.maximum(bits, 1), on & (bits > 0))
            main = tl.where(bits == 0, code, tl.where(bits < 0, ids, main))
        helper = hashed(mixed, tl.load(chunk + 3), tl.load(chunk + 4), helper_rows) + num_rows
        _store(out_ptr, begins, at, main, helper, on, two, PAIRS)
        if weights_ptr is not None:
            _store(out_weights_ptr, begins, at, weights, weights, on, two, PAIRS)
        begins += step_out


@triton.jit
def _is_sound(  # type: ignore[no-untyped-def]
    starts_ptr, out_starts_ptr, lookup_ptr, num_values, num_out, num_features, num_tables, step,
    FEATURES: tl.constexpr, ALIKE: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    # Whether features start one after the other among the ids, and their rows have the room there
    # is. The host does not wait for lengths, so that nobody has looked at them before.
    feature = tl.arange(0, FEATURES)
    real = feature < num_features
    at = starts_ptr + feature.to(tl.int64) * step
    start = tl.load(at, mask=real, other=0).to(tl.int64)
    end = tl.load(at + step, mask=real, other=0).to(tl.int64)
    wrong = real & ((start < 0) | (end < start) | (end > num_values))
    wrong = wrong | (real & (feature == 0) & (start != 0))
    last = _start(starts_ptr, num_features, step)
    copies = tl.load(lookup_ptr + 13)  # of any table, where all are alike
    total = _out_start(out_starts_ptr, num_tables, last, copies, ALIKE)
    fits = (total == num_out) if EXACT else (total <= num_out)
    return (tl.max(wrong.to(tl.int32), axis=0) == 0) & fits


@triton.jit
def _blank(  # type: ignore[no-untyped-def]
    program, out_ptr, out_weights_ptr, num_out, most_copies, VALUES: tl.constexpr
):
    # Rows of a batch that is not sound: row 0, which every table has.
    at = program * VALUES * most_copies + tl.arange(0, VALUES)
    zeros = tl.zeros(at.shape, tl.int64)
    for _ in range(most_copies):
        tl.store(out_ptr + at, zeros, mask=at < num_out)
        if out_weights_ptr is not None:
            tl.store(out_weights_ptr + at, zeros.to(tl.float32), mask=at < num_out)
        at += VALUES


@triton.jit
def _tell(table, wrong, invalid_ptr, first_bad_ptr):  # type: ignore[no-untyped-def]
    # Wrong bags count as ids out of bounds, and are found before all ids.
    zeros = tl.zeros(wrong.shape, tl.int64)
    if invalid_ptr is not None:
        tl.atomic_add(invalid_ptr + table + zeros, zeros + 1, mask=wrong, sem="relaxed")
    if first_bad_ptr is not None:
        tl.atomic_min(first_bad_ptr + table + zeros, zeros - 1, mask=wrong, sem="relaxed")


@triton.jit
def _bags(  # type: ignore[no-untyped-def]
    program, offsets_ptr, bag_starts_ptr, out_bag_starts_ptr, starts_ptr, lookup_ptr, features_at,
    out_starts_ptr, out_ptr, num_bags, num_features, num_out_features, num_tables, stride, step,
    is_sound, num_out, invalid_ptr, first_bad_ptr, EXACT: tl.constexpr,
    BAGS: tl.constexpr, STEPS: tl.constexpr, FEATURE_FIELDS: tl.constexpr,
    TABLE_FIELDS: tl.constexpr, VARIABLE: tl.constexpr, LONG: tl.constexpr, ALIKE: tl.constexpr,
):  # fmt: skip
    if LONG:  # all bags of a program are of one feature
        programs = tl.cdiv(stride, BAGS)
        number = program // programs
        within = (program - number * programs) * BAGS + tl.arange(0, BAGS)
        real = within < stride
        bag = number * stride + within
    else:
        bag = program * BAGS + tl.arange(0, BAGS)
        real = bag < num_bags
        if VARIABLE:
            number = last_at(out_bag_starts_ptr, 1, bag, num_out_features, STEPS)
            number = tl.where(real, number, 0)
            within = bag - tl.load(out_bag_starts_ptr + number)
        else:
            number = tl.where(real, bag // stride, 0)
            within = bag % stride
    feature = lookup_ptr + features_at + number * FEATURE_FIELDS
    slot, table = tl.load(feature), tl.load(feature + 1)
    chunk, rows = tl.load(feature + 2), tl.load(feature + 3)
    at = _first_bag(slot, bag_starts_ptr, stride, real, VARIABLE) + within
    start = tl.load(offsets_ptr + at, mask=real, other=0).to(tl.int64)
    if invalid_ptr is not None or first_bad_ptr is not None:
        after = tl.load(offsets_ptr + at + 1, mask=real, other=0).to(tl.int64)
        zeros = tl.zeros(at.shape, tl.int64)
        falls = real & (chunk + zeros == 0) & (after < start)  # once, not once a chunk
        _tell(table, tl.where(is_sound, falls, real & (bag == 0)), invalid_ptr, first_bad_ptr)
    field = lookup_ptr + table * TABLE_FIELDS
    first = _start(starts_ptr, tl.load(field + 6), step)
    last = _start(starts_ptr, tl.load(field + 7), step)
    copies = tl.load(field + 13)
    begins = _out_start(out_starts_ptr, table, first, copies, ALIKE)
    begins += (chunk * (last - first) - first) * rows
    # Bags of a table read its rows alone, wherever they are said to start.
    start = tl.minimum(tl.maximum(start, first), last)
    tl.store(out_ptr + bag, tl.where(is_sound, begins + start * rows, 0), mask=real)
    if program == 0:
        of_all = tl.load(lookup_ptr + 13)  # copies of any table, where all are alike
        end = _start(starts_ptr, num_features, step)
        end = _out_start(out_starts_ptr, num_tables, end, of_all, ALIKE)
        # FBGEMM's backward leaves what it keeps of rows in no bag unwritten: the last bag has all
        # rows of a batch that is not sound.
        tl.store(out_ptr + num_bags, tl.where(is_sound, end, num_out if EXACT else 0))


@triton.jit(
    do_not_specialize=[
        "chunks_at", "features_at", "table_of_at", "num_values", "num_out", "num_features",
        "num_out_features", "num_tables", "num_bags", "stride", "step", "row_programs",
        "most_copies",
    ]
)  # fmt: skip
def expand(  # type: ignore[no-untyped-def]
    ids_ptr, weights_ptr, offsets_ptr, bag_starts_ptr, out_bag_starts_ptr, starts_ptr,
    out_starts_ptr, lookup_ptr, out_ptr, out_weights_ptr, out_offsets_ptr, invalid_ptr,
    first_bad_ptr, chunks_at, features_at, table_of_at, num_values, num_out, num_features,
    num_out_features, num_tables, num_bags, stride, step, row_programs, most_copies,
    FEATURES: tl.constexpr, EXACT: tl.constexpr,
    CHUNKS: tl.constexpr, STEPS: tl.constexpr, BAG_STEPS: tl.constexpr, VALUES: tl.constexpr,
    BAGS: tl.constexpr, CODE_BITS: tl.constexpr, ROW_BYTES: tl.constexpr, RAW: tl.constexpr,
    MARK: tl.constexpr, PAIRS: tl.constexpr, TABLE_BY_TABLE: tl.constexpr, LONG: tl.constexpr,
    TABLE_FIELDS: tl.constexpr, CHUNK_FIELDS: tl.constexpr, FEATURE_FIELDS: tl.constexpr,
):  # fmt: skip
    """Programs below `row_programs` write rows, the others offsets; see triton_expand.expand."""
    ALIKE: tl.constexpr = out_starts_ptr is None
    VARIABLE: tl.constexpr = bag_starts_ptr is not None
    if ALIKE:
        starts_ptr = offsets_ptr
    program = tl.program_id(0).to(tl.int64)
    is_sound = _is_sound(starts_ptr, out_starts_ptr, lookup_ptr, num_values, num_out, num_features,
                         num_tables, step, FEATURES, ALIKE, EXACT)  # fmt: skip
    if program < row_programs:
        # A batch may have values beyond its last bag, which belong to no table.
        begin = program * VALUES
        end = tl.minimum(num_values, _start(starts_ptr, num_features, step))
        count = tl.maximum(tl.minimum(end - begin, VALUES), 0).to(tl.int32)
        if not is_sound:
            count = count * 0
            _blank(program, out_ptr, out_weights_ptr, num_out, most_copies, VALUES)
        at = tl.arange(0, VALUES)
        ids = tl.load(ids_ptr + begin + at, mask=at < count, other=0).to(tl.int64)
        if TABLE_BY_TABLE:  # what all ids of a table share is read and computed once
            table, last = _tables_of(begin, count, starts_ptr, lookup_ptr, table_of_at,
                                     num_features, step, STEPS)  # fmt: skip
            while table <= last:
                _rows(table, begin, count, ids, weights_ptr, starts_ptr, lookup_ptr, chunks_at,
                      out_starts_ptr, out_ptr, out_weights_ptr, invalid_ptr, first_bad_ptr, step,
                      CHUNKS, VALUES, CODE_BITS, ROW_BYTES, RAW, MARK, PAIRS, ALIKE, TABLE_FIELDS,
                      CHUNK_FIELDS)  # fmt: skip
                table += 1
        else:
            feature = last_at(starts_ptr, step, begin + at, num_features, STEPS)
            table = tl.load(lookup_ptr + table_of_at + feature, mask=at < count, other=0)
            _rows(table, begin, count, ids, weights_ptr, starts_ptr, lookup_ptr, chunks_at,
                  out_starts_ptr, out_ptr, out_weights_ptr, invalid_ptr, first_bad_ptr, step,
                  CHUNKS, VALUES, CODE_BITS, ROW_BYTES, RAW, MARK, PAIRS, ALIKE, TABLE_FIELDS,
                  CHUNK_FIELDS)  # fmt: skip
    else:
        _bags(program - row_programs, offsets_ptr, bag_starts_ptr, out_bag_starts_ptr, starts_ptr,
              lookup_ptr, features_at, out_starts_ptr, out_offsets_ptr, num_bags, num_features,
              num_out_features, num_tables, stride, step, is_sound, num_out, invalid_ptr,
              first_bad_ptr, EXACT, BAGS, BAG_STEPS, FEATURE_FIELDS,
              TABLE_FIELDS, VARIABLE, LONG, ALIKE)  # fmt: skip
