"""Codes of any number of bits: packed, read and written as a list of numbers is."""

import pytest
import torch

from cce_torchrec import CCEEmbeddingBagConfig
from cce_torchrec.codes.chunk_codes import ChunkCodes
from cce_torchrec.codes.old_codes import packed_codes, take_old_codes
from cce_torchrec.codes.storage import (
    column_of,
    converted,
    empty_codes,
    fill_hashed,
    hashed_codes,
    in_whole_words,
)
from cce_torchrec.lookup import native
from cce_torchrec.lookup.table_lookup import TableLookup
from cce_torchrec.packing import CodePacking
from cce_torchrec.table import Table

BITS = [1, 2, 3, 4, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32]
"""All that tables have; 5, 13 and the like are none of them, and work all the same."""


def some_codes(bits, ids, chunks):
    """Any codes, and those of all bits set."""
    g = torch.Generator().manual_seed(bits)
    codes = torch.randint(min(2**bits, 2**31 - 1), (ids, chunks), generator=g)
    codes[::5] = 2 ** min(bits, 31) - 1
    return codes


def by_hand(packing, codes):
    """Bytes of packed `codes`, from the bits of each number."""
    ids, chunks = codes.shape
    rows, width = packing.shape(ids, chunks)
    out = [[0] * width for _ in range(rows)]
    for i in range(ids):
        for j in range(chunks):
            for bit in range(packing.bits):
                at = (i % packing.group) * packing.bits + bit
                set_ = int(codes[i, j]) >> bit & 1
                out[i // packing.group][j * packing.width + at // 8] |= set_ << at % 8
    return torch.tensor(out, dtype=torch.uint8).view(rows, width)


@pytest.mark.parametrize("bits", [*BITS, 5, 7, 13, 31])
def test_packed_codes_are_these_bits(bits):
    packing, codes = CodePacking(bits), some_codes(bits, 21, 3)
    assert torch.equal(packing.pack(codes), by_hand(packing, codes))


@pytest.mark.parametrize("chunks", [1, 3, 4, 8])
@pytest.mark.parametrize("bits", [*BITS, 5, 7, 13, 31])
def test_packed_codes_read_as_they_were(bits, chunks):
    packing, ids = CodePacking(bits), torch.randint(1003, (300,))
    codes = some_codes(bits, 1003, chunks)
    packed = packing.pack(codes)
    assert list(packed.shape) == packing.shape(1003, chunks)
    assert torch.equal(packing.unpack(packed, 1003), codes)
    assert torch.equal(packing.read(packed, ids, chunks), codes[ids])
    assert torch.equal(packing.read_words(packed, ids, chunks), codes[ids])
    column = chunks - 1
    assert torch.equal(column_of(packed, packing, column, 17, 1003), codes[17:, column])


@pytest.mark.parametrize("bits", BITS)
def test_a_chunk_is_written_without_the_others(bits):
    packing, codes = CodePacking(bits), some_codes(bits, 101, 4)
    packed, other = packing.pack(codes), some_codes(bits, 101, 1).flip(0)
    packing.write(packed, 2, 16, other[16:, 0])
    codes[16:, 2] = other[16:, 0]
    assert torch.equal(packing.unpack(packed, 101), codes)
    assert torch.equal(packed, packing.pack(codes))  # unused bits stay 0


@pytest.mark.parametrize("before", [1, 3, 8, 12])
@pytest.mark.parametrize("after", [2, 6, 8, 14, 20])
def test_codes_are_packed_in_another_way(before, after):
    codes = some_codes(min(before, after), 53, 4)
    packings = CodePacking(before), CodePacking(after)
    found = converted(packings[0].pack(codes), *packings, 53, 4)
    assert torch.equal(found, packings[1].pack(codes))


def table(num_rows, num_embeddings=1001, **kwargs):
    return CCEEmbeddingBagConfig(
        name="t", num_embeddings=num_embeddings, embedding_dim=16, feature_names=["f"],
        **{"num_rows": num_rows, "num_helper_rows": 7, **kwargs},
    )  # fmt: skip


ROWS = [1, 2, 4, 5, 16, 60, 256, 300, 4096, 9000, 65_536, 70_000]


@pytest.mark.parametrize("num_rows", ROWS)
def test_every_lookup_reads_the_same_rows(num_rows):
    """Packed codes in torch, in C++ and as a list of numbers; without bits they are 0."""
    codes = ChunkCodes(Table(table(num_rows)), range(4), torch.device("cpu"))
    assert codes.packing.bits == table(num_rows).code_bits
    assert (codes.codes is None) == (num_rows == 1)
    lookup, ids = TableLookup(codes.table, [0], codes, [0, 1, 2, 3]), torch.randint(1001, (5000,))
    ids[:4] = torch.tensor([1000, 999, 0, 1000])  # words at the end must not be read beyond it
    rows = lookup.rows(ids)
    assert torch.equal(rows[..., 0], codes.unpacked[ids].t())
    assert int(rows[..., 0].max()) < num_rows
    if native.available():
        out = torch.empty(rows.numel(), dtype=torch.int64)
        native.expand([lookup.job(ids, out)])
        assert torch.equal(out.view(rows.shape), rows)


@pytest.mark.parametrize("num_rows", ROWS)
@pytest.mark.parametrize("ids", [range(0, 1001), range(200, 400), range(1000, 1001)])
def test_a_part_of_a_table_has_its_codes(num_rows, ids):
    whole = ChunkCodes(Table(table(num_rows)), range(4), torch.device("cpu"))
    part = whole.select(whole.table, [3, 1], torch.device("cpu"), ids)
    assert torch.equal(part.unpacked, whole.unpacked[ids.start : ids.stop, [3, 1]])


@pytest.mark.parametrize("num_rows", ROWS[1:])
@pytest.mark.parametrize("first", [0, 3, 8, 41])
def test_new_ids_start_from_their_hash_and_others_keep_theirs(num_rows, first):
    config = table(num_rows, num_embeddings=99)
    codes = config.packing.pack(torch.zeros(99, 4, dtype=torch.int64))
    fill_hashed(codes, config, range(4), range(99), first)
    fresh = hashed_codes(config, range(4), torch.device("cpu"))
    fresh = config.packing.unpack(fresh, 99)
    fresh[:first] = 0
    assert torch.equal(config.packing.unpack(codes, 99), fresh)


@pytest.mark.parametrize("num_rows", [*ROWS[1:], 2**31 - 1])
def test_codes_of_old_checkpoints_are_packed(num_rows):
    config = table(num_rows, num_helper_rows=0)
    dtype = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[
        1 if num_rows <= 2**8 else 2 if num_rows <= 2**16 else 4
    ]
    codes = torch.randint(num_rows, (1001, 4))
    codes[0] = num_rows - 1
    state = {"codes": codes.to(dtype), "other": torch.zeros(1)}
    take_old_codes(config, state, "codes", 1001, 4)
    assert torch.equal(state["codes"], config.packing.pack(codes))
    packed = dict(state)
    take_old_codes(config, state, "codes", 1001, 4)  # which they are already
    assert torch.equal(packed["codes"], state["codes"])


def test_old_codes_without_bits_are_left_out():
    state = {"codes": torch.zeros(1001, 4, dtype=torch.uint8)}
    take_old_codes(table(1), state, "codes", 1001, 4)
    assert not state


def test_whole_codes_keep_their_memory():
    codes = torch.arange(12, dtype=torch.int16).view(3, 4)
    assert packed_codes(codes, CodePacking(16)).data_ptr() == codes.data_ptr()


@pytest.mark.parametrize("offset", [0, 1, 8])
def test_packed_codes_are_put_in_whole_words(offset):
    storage = torch.arange(64, dtype=torch.uint8)
    codes = storage[offset : offset + 21].view(7, 3)
    found = in_whole_words(codes)
    assert torch.equal(found, codes) and found.storage_offset() % 8 == 0
    assert found.untyped_storage().nbytes() - found.storage_offset() >= 24
    made = empty_codes(CodePacking(3), 20, 1, None)
    assert in_whole_words(made) is made
