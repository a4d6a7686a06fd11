"""Packed tables on a CUDA device: the Triton lookup against the one for CPUs."""

import pytest
import torch

from cce_torchrec import CCEEmbeddingBagCollection, CCEEmbeddingBagConfig, cluster
from cce_torchrec.inference import inference_collection, load_inference, save_inference
from cce_torchrec.inference.row_types import ROW_TYPES
from tests.support.inference import batch_of, many_tables, tensors, trained

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
# The compiled operator rounds products where a processor has no fused ones.
FUSED_PRODUCTS = torch.backends.cpu.get_cpu_capability() != "DEFAULT"


def moved(batch):
    return [None if own is None else own.cuda() for own in batch]


def pair(collection, data_type, ignores=False):
    return [
        inference_collection(collection, data_type=data_type, lookup=lookup, ignores=ignores)
        .to(device)
        .lookup
        for lookup, device in (("auto", "cpu"), ("triton", "cuda"))
    ]


def check(lookups, batch):
    cpu, cuda = lookups
    expected, found, again = cpu(*batch), *(cuda(*moved(batch)).cpu() for _ in range(2))
    assert torch.equal(found, again)
    if FUSED_PRODUCTS:
        assert torch.equal(found, expected)
    else:
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize("stage", ["fresh", "clustered", "finalized"])
@pytest.mark.parametrize("data_type", list(ROW_TYPES))
def test_kernel_equals_the_cpu(data_type, stage, is_weighted):
    collection = trained(is_weighted, stage)
    lookups = pair(collection, data_type)
    for num_bags, dtype in (
        (0, torch.int64),
        (1, torch.int64),
        (3000, torch.int64),
        (9, torch.int32),
    ):
        check(lookups, tensors(batch_of(collection, num_bags, dtype=dtype)))


@pytest.mark.parametrize("num_rows", [2, 70, 5000, 70_000])
@pytest.mark.parametrize("dim", [16, 80, 256])
def test_codes_and_widths(dim, num_rows):
    torch.manual_seed(0)
    config = CCEEmbeddingBagConfig(
        name="a", num_embeddings=100_001, embedding_dim=dim, num_rows=num_rows, feature_names=["f"]
    )
    collection = CCEEmbeddingBagCollection([config])
    for column in range(4):
        collection.codes["a"].write(column, torch.randint(0, num_rows, (100_001,)))
    collection.codes["a"].set_clusterings(1)
    lengths = torch.randint(0, 9, (20_000,))
    batch = torch.randint(0, 100_001, (int(lengths.sum()),)), lengths
    for data_type in ROW_TYPES:
        check(pair(collection, data_type), batch)


def test_what_is_out_of_bounds():
    collection = many_tables()
    values, lengths, _ = tensors(batch_of(collection, 50))
    values[-1] = 60
    cuda = pair(collection, "int8")[1]
    with pytest.raises(ValueError, match=r"table 'joint', feature 'y': id 60 is outside \[0, 60\)"):
        cuda(values.cuda(), lengths.cuda())
    check(pair(collection, "int8", ignores=True), (values, lengths))
    wrong = lengths.clone()
    wrong[3] = -1
    with pytest.raises(ValueError, match="length -1 of bag 3 is negative"):
        cuda(values.cuda(), wrong.cuda())
    with pytest.raises(ValueError, match="lengths add up to"):
        cuda(values.cuda()[:-1].repeat(2), lengths.cuda())


def test_no_wait_for_the_device():
    collection = many_tables()
    served = inference_collection(collection, lookup="triton", ignores=True).cuda()
    batch = batch_of(collection, 50).to(torch.device("cuda"))
    served(batch)  # which compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        served(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_exports_and_features_in_another_order(tmp_path):
    collection = many_tables()
    cluster(collection)
    folder = save_inference(inference_collection(collection), tmp_path / "export")
    cpu, cuda = load_inference(folder), load_inference(folder, lookup="triton").cuda()
    batch = batch_of(collection, 50)
    turned = batch.permute(list(range(len(batch.keys())))[::-1])
    for own in (batch, turned):
        found = cuda(own.to(torch.device("cuda"))).values().cpu()
        torch.testing.assert_close(found, cpu(own).values(), rtol=1e-6, atol=1e-6)
