"""Packed tables, looked up by operators of torch and FBGEMM, and by a kernel of our own."""

import copy
import os
import shutil
import subprocess
import sys

import pytest
import torch
from torchrec import EmbeddingBagConfig, EmbeddingConfig, KeyedJaggedTensor
from torchrec.inference.modules import quantize_embeddings
from torchrec.models.dlrm import DLRM

from cce_torchrec import (
    CCEEmbeddingBagCollection,
    CCEEmbeddingBagConfig,
    CCEEmbeddingCollection,
    cluster,
)
from cce_torchrec.codes.hashing import mix
from cce_torchrec.inference import inference_collection, inference_model, native
from cce_torchrec.inference.packed_tables import PackedTables
from cce_torchrec.inference.portable import mixed
from cce_torchrec.inference.row_types import ROW_TYPES
from tests.support.inference import batch_of, many_tables, one_table, tensors, trained

LOOKUPS = [
    "portable",
    pytest.param(
        "fused", marks=pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
    ),
]
SANITIZERS = ("LD_PRELOAD", "ASAN_OPTIONS", "UBSAN_OPTIONS")


@pytest.mark.parametrize("lookup", LOOKUPS)
@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize("stage", ["fresh", "clustered", "finalized"])
def test_float32_is_what_was_trained_to_the_bit(lookup, is_weighted, stage):
    collection = trained(is_weighted, stage)
    served = inference_collection(collection, data_type="fp32", lookup=lookup)
    for num_bags in (1, 7):
        batch = batch_of(collection, num_bags)
        expected, found = collection(batch), served(batch)
        assert found.keys() == expected.keys()
        assert found.length_per_key() == expected.length_per_key()
        assert torch.equal(found.values(), expected.values())


@pytest.mark.parametrize("lookup", LOOKUPS)
@pytest.mark.parametrize("data_type", ["fp16", "int8", "int4"])
def test_narrow_rows_are_the_trained_ones_rounded(lookup, data_type):
    collection = trained(is_weighted=False, stage="clustered")
    rounded, row_type = copy.deepcopy(collection), ROW_TYPES[data_type]
    for bag in rounded.embedding_bag_collection.embedding_bags.values():
        dim = bag.weight.shape[1]
        bag.weight.data = row_type.unpacked(row_type.packed(bag.weight), dim)
    served = inference_collection(collection, data_type=data_type, lookup=lookup)
    batch = batch_of(collection, 9)
    found, expected = served(batch).values(), rounded(batch).values()
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-6)
    assert not torch.equal(found, collection(batch).values())


@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize("data_type", list(ROW_TYPES))
@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_both_lookups_give_the_same_bits(data_type, is_weighted):
    collection = trained(is_weighted, "clustered")
    pair = [
        inference_collection(collection, data_type=data_type, lookup=lookup)
        for lookup in ("portable", "fused")
    ]
    # Of more ids than a tile has.
    for num_bags, dtype in [(0, torch.int64), (200, torch.int64), (3, torch.int32)]:
        batch = batch_of(collection, num_bags, dtype=dtype)
        portable, fused = (served.lookup(*tensors(batch)) for served in pair)
        assert fused.shape == (num_bags, pair[0].lookup.total_dim)
        assert torch.equal(portable, fused)


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_outputs_that_leave_the_caches_are_the_same():
    torch.manual_seed(0)
    collection = one_table(embedding_dim=64)
    cluster(collection)
    num_bags = 20_000  # 5 MB, from 4 on they are written past them
    values, lengths = torch.randint(0, 1000, (num_bags,)), torch.ones(num_bags).long()
    for data_type in ROW_TYPES:
        portable, fused = (
            inference_collection(collection, data_type=data_type, lookup=lookup).lookup
            for lookup in ("portable", "fused")
        )
        expected = portable(values, lengths)
        assert torch.equal(fused(values, lengths), expected)
        threads = torch.get_num_threads()
        torch.set_num_threads(2)
        try:
            assert torch.equal(fused(values, lengths), expected)
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize("dim", [2, 6, 14, 44, 50])
@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_plain_tables_of_any_width(dim):
    torch.manual_seed(0)
    plain = EmbeddingBagConfig(name="p", num_embeddings=50, embedding_dim=dim, feature_names=["g"])
    collection = CCEEmbeddingBagCollection([plain])
    batch = batch_of(collection, 20)
    for data_type in ("fp32", "fp16", "int8"):
        fused, portable = (
            inference_collection(collection, data_type=data_type, lookup=lookup)(batch).values()
            for lookup in ("fused", "portable")
        )
        assert torch.allclose(fused, portable, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("num_rows", [2, 4, 16, 64, 1000, 5000, 70_000])
@pytest.mark.parametrize("num_chunks", [1, 4])
@pytest.mark.parametrize("lookup", LOOKUPS)
def test_codes_of_any_number_of_bits(lookup, num_rows, num_chunks):
    torch.manual_seed(0)
    collection = one_table(num_rows, num_chunks=num_chunks, num_helper_rows=3)
    codes = collection.codes["a"]
    for column in range(num_chunks):
        codes.write(column, torch.randint(0, num_rows, (1000,)))
    codes.set_clusterings(1)
    packed = PackedTables.of(collection, ROW_TYPES["fp32"])
    assert packed.tables[0].code_bytes == -(-1000 * num_chunks * codes.packing.bits // 8)
    served = inference_collection(collection, data_type="fp32", lookup=lookup)
    every = KeyedJaggedTensor(["f"], torch.arange(1000), lengths=torch.ones(1000).long())
    assert torch.equal(served(every).values(), collection(every).values())


def test_tables_that_were_not_clustered_store_no_codes():
    assert PackedTables.of(one_table(), ROW_TYPES["int8"]).tables[0].code_bytes == 0


def test_hashes_are_those_of_training():
    ids = torch.tensor([0, 1, -1, 2**62, -(2**63), 12345678901])
    assert torch.equal(mixed(ids), mix(ids))


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_machines_without_vectors_give_the_same_to_rounding(tmp_path):
    torch.manual_seed(0)
    collection = trained(is_weighted=True, stage="clustered")
    values, lengths, weights = tensors(batch_of(collection, 50))
    served = {t: inference_collection(collection, data_type=t, lookup="fused").lookup
              for t in ROW_TYPES}  # fmt: skip
    for name, lookup in served.items():
        torch.jit.script(lookup).save(tmp_path / f"{name}.pt")
    torch.save((values, lengths, weights), tmp_path / "batch")
    code = (
        f"import torch; torch.ops.load_library({str(native.library())!r})\n"
        f"batch = torch.load({str(tmp_path / 'batch')!r})\n"
        f"for t in {list(ROW_TYPES)}:\n"
        f"    found = torch.jit.load(f'{tmp_path}/{{t}}.pt')(*batch)\n"
        f"    torch.save(found, f'{tmp_path}/{{t}}.found')\n"
    )
    # A library that is built with sanitizers (tests/sanitize.py) needs theirs in this process, too.
    kept = {name: os.environ[name] for name in SANITIZERS if name in os.environ}
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={"CCE_CPU_LEVEL": "none", "PATH": "", **kept}
    )
    same = []
    for name, lookup in served.items():
        found, expected = torch.load(tmp_path / f"{name}.found"), lookup(values, lengths, weights)
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)
        same.append(torch.equal(found, expected))
    # Without fused products some last bits differ, by which the plain form is known to have run.
    assert not all(same) or torch.backends.cpu.get_cpu_capability() == "DEFAULT"


@pytest.mark.parametrize("scripted", [False, True])
@pytest.mark.parametrize("lookup", LOOKUPS)
def test_ids_out_of_bounds_are_refused_or_read_as_id_0(lookup, scripted):
    collection = many_tables()
    batch = batch_of(collection, 4)
    values = batch.values().clone()
    at = int(batch.offset_per_key()[-2])  # of the last feature, "y" of 60 ids
    for bad in (60, -1, 2**40):
        values[at] = bad
        broken = KeyedJaggedTensor(batch.keys(), values, lengths=batch.lengths())
        served = inference_collection(collection, lookup=lookup)
        served = torch.jit.script(served) if scripted else served
        with pytest.raises(
            (ValueError, RuntimeError, torch.jit.Error),
            match=rf"table 'joint', feature 'y': id {bad} is outside \[0, 60\)",
        ):
            served(broken)
        ignoring = inference_collection(collection, lookup=lookup, ignores=True)
        ignoring = torch.jit.script(ignoring) if scripted else ignoring
        zero = values.clone()
        zero[at] = 0
        expected = KeyedJaggedTensor(batch.keys(), zero, lengths=batch.lengths())
        assert torch.equal(ignoring(broken).values(), ignoring(expected).values())
        assert values[at] == bad  # the caller's


@pytest.mark.parametrize("lookup", LOOKUPS)
def test_features_in_any_order_and_some_more(lookup):
    collection = many_tables()
    served = inference_collection(collection, lookup=lookup)
    batch = batch_of(collection, 4)
    turned = batch.permute(list(range(len(batch.keys())))[::-1])
    for model in (served, torch.jit.script(served)):
        assert torch.equal(model(turned).values(), served(batch).values())
        with pytest.raises((ValueError, torch.jit.Error), match="lack raw, which a table reads"):
            model(batch.permute([0, 1, 2, 4, 5, 6]))


def test_tables_that_are_pooled_by_weights_want_some():
    batch = batch_of(many_tables(), 2)
    served = inference_collection(many_tables(is_weighted=True), lookup="portable")
    with pytest.raises(ValueError, match="pooled by weights"):
        served(batch)


@pytest.mark.parametrize("lookup", LOOKUPS)
def test_sequences(lookup):
    torch.manual_seed(0)
    tables = [
        CCEEmbeddingBagConfig(
            name="a", num_embeddings=100, embedding_dim=16, num_rows=20, feature_names=["f", "g"]
        ),
        EmbeddingConfig(name="p", num_embeddings=50, embedding_dim=16, feature_names=["g"]),
    ]
    for need_indices in (False, True):
        collection = CCEEmbeddingCollection(tables, need_indices=need_indices)
        cluster(collection)
        served = inference_collection(collection, data_type="fp32", lookup=lookup)
        ids, lengths = torch.tensor([1, 99, 3, 4, 5, 49]), torch.tensor([2, 0, 1, 0, 3, 0])
        batch = KeyedJaggedTensor(["f", "g"], ids, lengths=lengths)
        expected = collection(batch)
        for model in (served, torch.jit.script(served)):
            found = model(batch)
            assert list(found) == list(expected)
            for key, own in expected.items():
                assert torch.equal(found[key].values(), own.values())
                assert torch.equal(found[key].lengths(), own.lengths())
                if need_indices:
                    assert torch.equal(found[key].weights(), own.weights())


def test_a_model_is_copied_with_its_collections_packed():
    torch.manual_seed(0)
    model = DLRM(one_table(), 4, [8, 16], [8, 1])
    cluster(model)
    served = inference_model(model, data_type="fp32", lookup="portable")
    dense = torch.randn(3, 4)
    features = KeyedJaggedTensor(["f"], torch.tensor([1, 2, 999]), lengths=torch.ones(3).int())
    assert torch.equal(served(dense, features), model(dense, features))
    assert torch.equal(torch.jit.script(served)(dense, features), model(dense, features))
    own, copied = model.dense_arch.state_dict(), served.dense_arch.state_dict()
    assert all(own[key].data_ptr() != copied[key].data_ptr() for key in own)


def test_main_rows_that_an_optimizer_has_moved_are_put_back():
    torch.manual_seed(0)
    collection = one_table(4, num_helper_rows=40, recipe="rare")
    optimizer = torch.optim.Adagrad(collection.parameters(), lr=0.1)
    batch = KeyedJaggedTensor(["f"], torch.arange(64), lengths=torch.ones(64).int())
    cluster(collection, optimizer=optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        collection(batch).values().square().sum().backward()
        optimizer.step()
    served = inference_collection(collection, data_type="fp32", lookup="portable")
    assert torch.equal(served(batch).values(), collection(batch).values())


@pytest.mark.parametrize("scripted", [False, True])
def test_a_batch_size_per_feature_is_refused(scripted):
    names = ["f", "g", "h", "raw", "q", "x", "y"]
    batch = KeyedJaggedTensor(
        names,
        torch.zeros(8).long(),
        lengths=torch.ones(8).int(),
        stride_per_key_per_rank=[[2], *([1] for _ in names[1:])],
    )
    served = inference_collection(many_tables(), lookup="portable")
    served = torch.jit.script(served) if scripted else served
    with pytest.raises((ValueError, torch.jit.Error), match="one batch size for all features"):
        served(batch)


def test_values_beyond_a_data_type_are_refused():
    collection = one_table()
    collection.embedding_bag_collection.embedding_bags["a#0"].weight.data.fill_(1e5)
    for data_type in ("fp16", "int8", "int4"):
        with pytest.raises(ValueError, match=f"too large for {data_type} .its scales are float16"):
            inference_collection(collection, data_type=data_type, lookup="portable")
    inference_collection(collection, data_type="fp32", lookup="portable")


def test_quantised_models_are_not_packed():
    model = torch.nn.Sequential(one_table())
    quantize_embeddings(model, torch.qint8, inplace=True)
    with pytest.raises(ValueError, match="table 'a' is quantised already"):
        inference_model(model)


def test_what_cannot_be_packed_is_refused():
    with pytest.raises(ValueError, match="the collection has no tables to pack"):
        inference_collection(CCEEmbeddingBagCollection([]))
    with pytest.raises(ValueError, match="Linear is no CCE collection"):
        inference_collection(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="Linear has no CCE collection"):
        inference_model(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="row type 'int2' is none of"):
        inference_collection(one_table(), data_type="int2")
    with pytest.raises(ValueError, match="lookup 'fast' is none of"):
        inference_collection(one_table(), lookup="fast")
    narrow = EmbeddingBagConfig(name="p", num_embeddings=50, embedding_dim=14)
    with pytest.raises(ValueError, match="table 'p': 14 values of int4 are no whole number"):
        inference_collection(CCEEmbeddingBagCollection([narrow]), data_type="int4")
    broken = one_table()
    broken.embedding_bag_collection.embedding_bags["a#1"].weight.data[3] = float("nan")
    with pytest.raises(ValueError, match="table 'a' has NaN or infinite values"):
        inference_collection(broken)


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
@pytest.mark.parametrize("lookup", ["portable", "fused"])
def test_batches_that_do_not_fit_are_refused(lookup):
    kind, lookup = lookup, inference_collection(many_tables(), lookup=lookup).lookup
    values, lengths = torch.zeros(14).long(), torch.ones(14).long()
    with pytest.raises(ValueError, match="lengths add up to 13, and 14 values"):
        lookup(values, torch.cat([torch.zeros(1).long(), lengths[1:]]))
    with pytest.raises(ValueError, match="13 lengths are no batch of 7 features"):
        lookup(values, lengths[1:])
    # Huge ones, the sum of which wraps around to what is expected.
    for first in ([-1, 3], [2**62, 2**62, 2**62, 2**62 + 4], [15, -13]):
        own = torch.cat([torch.tensor(first), lengths[len(first) :]])
        with pytest.raises(ValueError, match="is negative, or more than"):
            lookup(values, own)
    weighted = inference_collection(many_tables(is_weighted=True), lookup=kind).lookup
    with pytest.raises(ValueError, match="13 weights for 14 values"):
        weighted(values, lengths, torch.ones(13))
    with pytest.raises(ValueError, match="are pooled by weights; give one for each id"):
        weighted(values, lengths)
    assert torch.equal(
        weighted(values, lengths, torch.ones(14).double()),
        weighted(values, lengths, torch.ones(14)),
    )
    with pytest.raises(ValueError, match="are not pooled by weights; leave the weights out"):
        lookup(values, lengths, torch.ones(14))
    with pytest.raises(ValueError, match="must be int32 or int64"):
        lookup(values.float(), lengths)
    with pytest.raises(ValueError, match="must be int32 or int64"):
        lookup(values.short(), lengths)


def test_a_library_that_came_with_an_image_is_taken(monkeypatch, tmp_path):
    shipped = native.library()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(os, "access", lambda *_: False)  # to the user of the image
    assert native.library() == shipped


def test_a_missing_compiler_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "_folder", lambda: tmp_path)
    monkeypatch.setenv("CXX", "no-such-compiler -O3")
    with pytest.raises(RuntimeError, match="CXX names no compiler"):
        native.library()
    monkeypatch.setenv("CXX", f"{sys.executable} -c 'raise SystemExit(1)'")
    with pytest.raises(RuntimeError, match="the fused lookup does not compile"):
        native.library()
    monkeypatch.delenv("CXX")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match=r"install g\+\+, or ask for lookup='portable'"):
        native.library()
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_a_library_that_a_server_has_loaded_will_do(tmp_path):
    copied = shutil.copy(native.library(), tmp_path / "libcopy.so")
    code = (
        f"import torch; torch.ops.load_library({str(copied)!r})\n"
        "from cce_torchrec.inference import native\n"
        "native.load()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
