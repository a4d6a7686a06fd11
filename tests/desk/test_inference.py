"""Packed tables on the device: the kernel against the lookup for CPUs, and waits of the host."""

import copy

import pytest
import torch
from torchrec import EmbeddingBagConfig, EmbeddingConfig, KeyedJaggedTensor, PoolingType
from triton.runtime.interpreter import _interpreter

from cce_torchrec import (
    CCEEmbeddingBagCollection,
    CCEEmbeddingBagConfig,
    CCEEmbeddingCollection,
    cluster,
    finalize,
)
from cce_torchrec.inference import inference_collection, load_inference, save_inference
from cce_torchrec.inference.row_types import ROW_TYPES
from tests.desk.counts import counting
from tests.desk.emulated import on_cpu
from tests.support.inference import batch_of, many_tables, one_table, tensors

# Products that are not rounded: the processor's, and those of Triton's interpreter.
FUSED_PRODUCTS = torch.backends.cpu.get_cpu_capability() != "DEFAULT" and hasattr(
    _interpreter, "fma_fp32"
)
LAUNCHES = {True: 2, False: 3}
"""By `ignores`: a sum over the lengths, the kernel, and room for what it finds."""


def pair(collection, data_type="fp32", ignores=False):
    """The lookups of `collection` for CPUs and on the device."""
    return [
        inference_collection(collection, data_type=data_type, lookup=lookup, ignores=ignores)
        .to(device)
        .lookup
        for lookup, device in (("auto", "cpu"), ("triton", "cuda"))
    ]


def moved(*batch):
    return [None if own is None else own.to("cuda") for own in batch]


def check(lookups, *batch):
    """Both give the same bits."""
    cpu, cuda = lookups
    expected, found = cpu(*batch), on_cpu(cuda(*moved(*batch)))
    assert found.shape == expected.shape and found.dtype == torch.float32
    if FUSED_PRODUCTS:
        assert torch.equal(found, expected)
    else:
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


BATCHES = {
    "fresh": [(5, torch.int32)],
    "clustered": [(18, torch.int64)],
    "finalized": [(3, torch.int64), (1, torch.int32), (0, torch.int64)],
}
"""Numbers of bags and types of ids. A bag of the wide table has 8 slots of the 128 of a program, so
that 18 are two programs."""


@pytest.mark.parametrize("is_weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("data_type", list(ROW_TYPES))
def test_tables_of_every_kind(data_type, is_weighted):
    """Hashed, coded, finalized, plain and raw; SUM and MEAN; shared and joint; empty bags."""
    collection = many_tables(is_weighted)
    for stage in ("fresh", "clustered", "finalized"):
        if stage == "clustered":
            cluster(collection)
        if stage == "finalized":
            finalize(collection, tables=["a", "wide"])
        lookups = pair(collection, data_type)
        for num_bags, dtype in BATCHES[stage]:
            check(lookups, *tensors(batch_of(collection, num_bags, dtype=dtype)))


WIDTHS = {
    "chunks of 20": ([80], list(ROW_TYPES)),
    "chunks of 40": ([160], list(ROW_TYPES)),
    "6": ([6], ["fp32", "fp16", "int8"]),
    "odd, beside a wide one": ([7, 64], ["fp32", "fp16"]),
    "narrow and wide": ([10, 4, 208], ["fp32", "fp16", "int8"]),
}
"""Dimensions of tables, of four chunks where they are multiples of 16, and row types that have
such widths."""


@pytest.mark.parametrize("widths", WIDTHS)
def test_widths(widths):
    dims, data_types = WIDTHS[widths]
    collection = CCEEmbeddingBagCollection([
        CCEEmbeddingBagConfig(
            name=f"t{i}", num_embeddings=500, embedding_dim=dim, num_rows=30,
            feature_names=[f"f{i}"],
        )
        if dim % 16 == 0
        else EmbeddingBagConfig(
            name=f"t{i}", num_embeddings=500, embedding_dim=dim, feature_names=[f"f{i}"],
            pooling=PoolingType.MEAN,
        )
        for i, dim in enumerate(dims)
    ])  # fmt: skip
    for codes in collection.codes.values():
        for column in range(4):
            codes.write(column, torch.randint(0, 30, (500,)))
        codes.set_clusterings(1)
    # More bags than a program has, and one of more ids than others.
    lengths = torch.randint(0, 3, (len(dims) * 9,))
    lengths[4] = 20
    values = torch.randint(0, 500, (int(lengths.sum()),))
    for data_type in data_types:
        check(pair(collection, data_type), values, lengths)


@pytest.mark.parametrize("num_chunks", [1, 4])
@pytest.mark.parametrize("num_rows", [2, 16, 70, 5000, 70_000])
def test_codes_of_any_number_of_bits(num_rows, num_chunks):
    """1, 4, 7, 13 and 17 bits, in the first and in a later table."""
    collection = CCEEmbeddingBagCollection([
        CCEEmbeddingBagConfig(
            name=name, num_embeddings=501, embedding_dim=16, num_rows=num_rows, num_helper_rows=3,
            num_chunks=num_chunks, feature_names=[name],
        )
        for name in ("a", "b")
    ])  # fmt: skip
    for codes in collection.codes.values():
        for column in range(num_chunks):
            codes.write(column, torch.randint(0, num_rows, (501,)))
        codes.set_clusterings(1)
    check(pair(collection), torch.arange(501).repeat(2), torch.ones(1002).long())


def broken(batch, **changes):
    """Values of `batch` with some changed: by place, or by feature for its first id."""
    values, starts = batch.values().clone(), batch.offset_per_key()
    for key, value in changes.items():
        values[starts[batch.keys().index(key)]] = value
    return values, batch.lengths()


BAD = [
    {"y": 60},
    {"y": -1},
    {"x": 2**40, "y": 60},
    {"q": 333, "h": -(2**63)},
    {"g": 1000, "f": 1000},
]
"""Ids of features; that of the feature which comes first in the output is named."""


@pytest.mark.parametrize("bad", BAD)
def test_ids_out_of_bounds_are_refused(bad):
    collection = many_tables()
    batch = batch_of(collection, 4)
    cpu, cuda = pair(collection)
    said = []
    for lookup, move in ((cpu, lambda *own: own), (cuda, moved)):
        with pytest.raises(ValueError, match="is outside") as error:
            lookup(*move(*broken(batch, **bad)))
        said.append(str(error.value).splitlines()[0])
    assert said[0] == said[1]


@pytest.mark.parametrize("bad", BAD[2:4])
def test_ids_out_of_bounds_are_read_as_id_0(bad):
    ignoring = pair(collection := many_tables(), ignores=True)
    batch = batch_of(collection, 4)
    check(ignoring, *broken(batch, **bad))
    zero = broken(batch, **dict.fromkeys(bad, 0))
    assert torch.equal(*(on_cpu(ignoring[1](*moved(*b))) for b in (broken(batch, **bad), zero)))
    check(pair(collection), *zero)


def test_narrow_ids_out_of_bounds():
    collection = many_tables()
    batch = batch_of(collection, 4, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"table 'joint', feature 'y': id -7 is outside \[0, 60\)"):
        pair(collection)[1](*moved(*broken(batch, y=-7)))


def test_the_first_id_of_a_bag_is_named():
    with pytest.raises(ValueError, match=r"id 1000 is outside \[0, 1000\)"):
        pair(one_table())[1](*moved(torch.tensor([5, 1000, -1]), torch.tensor([0, 3])))


def test_infinite_weights():
    """A table without helper rows reads none, beside one that has some."""
    collection = CCEEmbeddingBagCollection(
        [
            CCEEmbeddingBagConfig(
                name=name, num_embeddings=50, embedding_dim=16, num_rows=9, feature_names=[name],
                num_helper_rows=rows,
            )
            for name, rows in (("a", 0), ("b", 5))
        ],
        is_weighted=True,
    )  # fmt: skip
    weights = torch.tensor([1.0, float("inf")] * 2)
    batch = torch.tensor([1, 2, 3, 4]), torch.tensor([2, 0, 1, 1]), weights
    cpu, cuda = pair(collection)
    expected, found = cpu(*batch), on_cpu(cuda(*moved(*batch)))
    assert expected[0, :16].isinf().all()
    torch.testing.assert_close(found, expected, equal_nan=True)


LENGTHS = [
    [2, -1, 3, 2],
    [2, 1, 3, 1],
    [9, 1, 3, 2],
    [2, 1, 3, 2, 0],
    [2**62, 2**62, 2**62, 2**62],
    [0, 0, 0, 6, -6, 6],
    [0, 0],
    [7, 0, 0, -1, 0, 0],
]
"""That do not fit 6 values: negative, too few, too many, of no value more than there are, and those
whose sum comes out right or wraps around."""


@pytest.mark.parametrize("lengths", LENGTHS)
def test_lengths_that_do_not_fit_are_refused_or_cut(lengths):
    collection = one_table()
    values, lengths = torch.tensor([1, 2, 3, 4, 5, 999]), torch.tensor(lengths)
    said = []
    for lookup, move in zip(pair(collection), (lambda *own: own, moved), strict=True):
        with pytest.raises(ValueError, match="length") as error:
            lookup(*move(values, lengths))
        said.append(str(error.value).splitlines()[0])
    assert said[0] == said[1]
    # Ids of the bag are those from its start to its end that are there.
    cpu, cuda = pair(collection, ignores=True)
    ends = lengths.cumsum(0)
    for found, start, end in zip(
        on_cpu(cuda(*moved(values, lengths))), ends - lengths, ends, strict=True
    ):
        start = int(start.clamp(0, 6))
        own = values[start : max(start, int(end.clamp(0, 6)))]
        assert torch.equal(found, cpu(own, torch.tensor([len(own)]))[0])


def test_batches_that_the_host_refuses():
    lookup = pair(many_tables())[1]
    values, lengths = moved(torch.zeros(7).long(), torch.ones(7).long())
    for batch, said in [
        ((values.float(), lengths), "must be int32 or int64"),
        ((values, lengths.view(7, 1)), "must be int32 or int64"),
        ((values, lengths[:5]), "5 lengths are no batch of 7 features"),
        ((values, lengths[:0]), "lengths add up to 0, and 7 values"),
        ((values, lengths, torch.ones(7, device="cuda")), "are not pooled by weights"),
        ((values, on_cpu(lengths)), "the tables are on cuda:0, and the batch is on cpu, cuda:0"),
    ]:
        with pytest.raises(ValueError, match=said):
            lookup(*batch)
    weighted = pair(many_tables(is_weighted=True))[1]
    for weights, said in [
        (None, "are pooled by weights; give one for each id"),
        (torch.ones(6, device="cuda"), "6 weights for 7 values"),
    ]:
        with pytest.raises(ValueError, match=said):
            weighted(values, lengths, weights)
    with pytest.raises(RuntimeError, match=r"run on CUDA, not on cpu; or make .* lookup='auto'"):
        lookup(on_cpu(values), on_cpu(lengths))


@pytest.mark.parametrize("ignores", [True, False])
def test_one_launch_and_no_wait_but_one_for_what_is_refused(ignores):
    for tables in (one_table(), many_tables()):
        served = inference_collection(tables, lookup="triton", ignores=ignores).to("cuda")
        batch = batch_of(tables, 5).to("cuda")
        served(batch)
        with counting() as counts:
            served(batch)
        assert counts.num_waits == (0 if ignores else 1), str(counts)
        assert counts.num_launches == LAUNCHES[ignores], str(counts)
        kernels = [what for what, _ in counts.launches if "Triton" in what]
        assert kernels == ["Triton's look_up"]


def test_collections_take_features_in_any_order():
    collection = many_tables(is_weighted=True)
    cpu = inference_collection(collection)
    cuda = inference_collection(collection, lookup="triton").to("cuda")
    batch = batch_of(collection, 4)
    turned = batch.permute(list(range(len(batch.keys())))[::-1])
    for own in (batch, turned):
        found = cuda(own.to("cuda"))
        assert found.keys() == cpu.keys
        torch.testing.assert_close(on_cpu(found.values()), cpu(own).values(), rtol=1e-6, atol=1e-6)


def test_sequences():
    collection = CCEEmbeddingCollection([
        CCEEmbeddingBagConfig(
            name="a", num_embeddings=100, embedding_dim=16, num_rows=20, feature_names=["f", "g"]
        ),
        EmbeddingConfig(name="p", num_embeddings=50, embedding_dim=16, feature_names=["g"]),
    ])  # fmt: skip
    cluster(collection)
    cpu = inference_collection(collection)
    cuda = inference_collection(collection, lookup="triton", ignores=True).to("cuda")
    ids, lengths = torch.tensor([1, 99, 3, 4, 5, 49]), torch.tensor([2, 0, 1, 0, 3, 0])
    batch = KeyedJaggedTensor(["f", "g"], ids, lengths=lengths, length_per_key=[3, 3])
    on_device, expected = batch.to("cuda"), cpu(batch)
    cuda(on_device)  # which sees whether kernels run at all, and waits for it
    with counting() as counts:
        found = cuda(on_device)
    assert counts.num_waits == 0, str(counts)
    assert list(found) == list(expected)
    for key, own in expected.items():
        assert torch.equal(on_cpu(found[key].values()), own.values())
        assert torch.equal(on_cpu(found[key].lengths()), own.lengths())


def test_exports_are_loaded_for_the_device(tmp_path):
    collection = many_tables()
    cluster(collection)
    served = inference_collection(collection, lookup="triton")
    folder = save_inference(served, tmp_path / "export")
    batch = batch_of(collection, 4)
    expected = load_inference(folder)(batch).values()
    for loaded in (load_inference(folder, lookup="triton"), copy.deepcopy(served)):
        found = loaded.to("cuda")(batch.to("cuda")).values()
        torch.testing.assert_close(on_cpu(found), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("lookup", ["portable", "auto"])
def test_lookups_for_cpus_name_the_one_for_gpus(lookup):
    served, batch = inference_collection(one_table(), lookup=lookup), batch_of(one_table(), 2)
    with pytest.raises(ValueError, match=r"runs on CPUs, and .* a GPU; .* lookup='triton'"):
        served(batch.to("cuda"))
    with pytest.raises(ValueError, match=r"runs on CPUs, and .* a GPU; .* lookup='triton'"):
        served.to("cuda")(batch)
