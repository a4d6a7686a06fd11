"""The compiled expansion and the torch form give the same rows, and treat bad ids alike."""

import pytest
import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from torchrec import EmbeddingBagConfig, KeyedJaggedTensor

from cce_torchrec import CCEEmbeddingBagConfig
from cce_torchrec.codes.chunk_codes import ChunkCodes
from cce_torchrec.codes.hashing import code_hash, hash_rows
from cce_torchrec.lookup import native
from cce_torchrec.lookup.bounds import BoundsCheck
from cce_torchrec.lookup.expansion import Expansion
from cce_torchrec.lookup.table_lookup import TableLookup
from cce_torchrec.table import Table, TableFeature

needs_native = pytest.mark.skipif(not native.available(), reason="built without a C++ compiler")


def made_codes(name, **kwargs):
    config = CCEEmbeddingBagConfig(
        name=name, embedding_dim=32, feature_names=["f"], **{"num_embeddings": 5000, **kwargs}
    )
    codes = ChunkCodes(Table(config), range(config.num_chunks), torch.device("cpu"))
    codes.set_clusterings(3)
    return config, codes


def blocks():
    """Tables of every storage type, with and without helper and codes; a part of a table; plain."""
    out, slots, keys = [], [], []

    def add(config, codes, columns, num_slots=1):
        at = list(range(len(slots), len(slots) + num_slots))
        table = codes.table if codes is not None else Table(config)
        out.append(TableLookup(table, at, codes, columns))
        slots.extend(TableFeature(config.name, f"f{i}") for i in at)
        keys.extend(f"{config.name}#{j}.{i}" for j in columns or [None] for i in at)

    for name, kwargs in {
        "byte": {"num_rows": 200, "num_helper_rows": 31},
        "short": {"num_rows": 50_000, "num_helper_rows": 7},
        "int": {"num_rows": 70_000, "num_helper_rows": 200_000},
        "two ints": {"num_rows": 70_000, "num_chunks": 2},
        "eight bytes": {"num_rows": 200, "num_chunks": 8},
        "finalized": {"num_rows": 300, "num_helper_rows": 0},
        "hash": {"num_rows": 40, "num_helper_rows": 50, "learned_codes": False},
        "eight": {"num_rows": 300, "num_chunks": 8},
        "three bytes": {"num_rows": 20, "num_chunks": 1},
    }.items():
        config, codes = made_codes(name, **kwargs)
        add(config, codes, list(range(config.num_chunks)), 2 if name == "short" else 1)
    config, codes = made_codes("part", num_rows=300)
    add(config, codes, [1, 3])
    add(EmbeddingBagConfig(
        name="plain", num_embeddings=90, embedding_dim=8, feature_names=["f"]
    ), None, [])  # fmt: skip
    return out, slots, keys


def batch(slots, bad, dtype=torch.int64, batch_size=37, weighted=False):
    g = torch.Generator().manual_seed(1)
    lengths = torch.randint(0, 60, (len(slots) * batch_size,), generator=g, dtype=torch.int32)
    ids = torch.randint(90, (int(lengths.sum()),), generator=g)
    if bad is not None:
        ids[::7] = bad
    weights = torch.rand(len(ids), generator=g) if weighted else None
    return KeyedJaggedTensor(
        [f"s{i}" for i in range(len(slots))], ids.to(dtype), weights, lengths=lengths
    )


@needs_native
@pytest.mark.parametrize("mode", [BoundsCheckMode.WARNING, BoundsCheckMode.IGNORE])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("bad", [None, -1, 2**31 - 1])
def test_compiled_equals_torch(monkeypatch, mode, dtype, bad):
    parts, slots, keys = blocks()
    expansion, found = Expansion(parts, slots, keys), []
    features = batch(slots, bad, dtype, weighted=True)
    before = features.values().clone()
    for compiled in (True, False):
        if not compiled:
            monkeypatch.setattr(native, "takes", lambda ids: False)
        check = BoundsCheck(mode)
        found.append((expansion(features, check), check.num_invalid))
    (one, count), (other, other_count) = found
    assert torch.equal(one.values(), other.values()) and one.values().dtype == torch.int64
    assert torch.equal(one.lengths(), other.lengths())
    assert torch.equal(one.weights(), other.weights())
    assert one.length_per_key() == other.length_per_key()
    assert one.values().numel() == int(one.lengths().sum()) == one.weights().numel()
    expected = len(before[::7]) if bad is not None and mode == BoundsCheckMode.WARNING else 0
    assert count == other_count == expected
    assert torch.equal(features.values(), before)


@needs_native
def test_compiled_fatal_names_the_first_bad_id():
    parts, slots, keys = blocks()
    features = batch(slots, 4242)
    with pytest.raises(ValueError, match=r"table 'plain', feature 'f11': id 4242 is outside"):
        Expansion(parts, slots, keys)(features, BoundsCheck(BoundsCheckMode.FATAL))


def test_empty_batch():
    parts, slots, keys = blocks()
    empty = torch.zeros(0, dtype=torch.int32)
    features = KeyedJaggedTensor([f"s{i}" for i in range(len(slots))], empty.long(), lengths=empty)
    rows = Expansion(parts, slots, keys)(features, BoundsCheck(BoundsCheckMode.WARNING))
    assert rows.values().numel() == 0 and rows.keys() == keys


def test_codes_that_change_are_followed():
    _, codes = made_codes("t", num_rows=300)
    expansion = Expansion(
        [TableLookup(codes.table, [0], codes, [0, 1, 2, 3])], [TableFeature("t", "f")], list("abcd")
    )
    features = KeyedJaggedTensor(["f"], torch.arange(50), lengths=torch.ones(50, dtype=torch.int32))
    check = BoundsCheck(BoundsCheckMode.WARNING)
    first = expansion(features, check).values().view(4, 50, 2)
    codes.set_clusterings(4)
    codes.packing.write(codes.codes, 2, 4, torch.tensor([*codes.unpacked[4:7, 2], 123]))
    second = expansion(features, check).values().view(4, 50, 2)
    assert int(second[2, 7, 0]) == 123
    assert not torch.equal(first[..., 1], second[..., 1])
    same = first[..., 0] == second[..., 0]
    assert int((~same).sum()) <= 1


def test_several_hashes_at_once_equal_one_by_one():
    ids = torch.tensor([0, 1, 5, 2**40, 2**62], dtype=torch.int64)
    functions = [code_hash(9, "t", j) for j in range(3)]
    multipliers = torch.tensor([[h.multiplier] for h in functions])
    addends = torch.tensor([[h.addend] for h in functions])
    together = hash_rows(ids, multipliers, addends, 12345)
    for row, h in zip(together, functions, strict=True):
        assert torch.equal(row, h(ids, 12345))
