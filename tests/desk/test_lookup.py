"""Lookups and their gradients on the device, equal to the CPU's."""

import pytest
import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from torchrec.modules.embedding_configs import PoolingType

from cce_torchrec import CCEEmbeddingBagConfig, CCEEmbeddingCollection
from cce_torchrec.clustering import cluster
from cce_torchrec.lookup import triton_expand
from tests.desk.emulated import on_cpu
from tests.desk.twins import (
    OPTIONS,
    assert_same_state,
    batch,
    joint_tables,
    mixed_tables,
    table,
    twins,
    two_tables,
)
from tests.support.models import tables as tables_of_the_sharded_tests
from tests.support.models import vbe_batch

BAD = [-1, 3000, 2**40, -(2**63)]


def lookup(cpu, cuda, features):
    """Both outputs, compared; both models have their gradients afterwards."""
    expected, got = cpu(features).values(), cuda(features.to("cuda")).values()
    assert got.is_cuda
    torch.testing.assert_close(on_cpu(got), expected)
    for module, out in ((cpu, expected), (cuda, got)):
        module.zero_grad()
        out.square().sum().backward()
    for (name, one), other in zip(cpu.named_parameters(), cuda.parameters(), strict=True):
        torch.testing.assert_close(
            on_cpu(other.grad), one.grad, msg=name, rtol=1e-4, atol=1e-5
        )  # sums of float32 in another order


@pytest.mark.parametrize("training", [True, False], ids=["training", "serving"])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("option", OPTIONS)
def test_forward_and_backward(option, weighted, training):
    settings = OPTIONS[option]
    cpu, cuda = twins(two_tables(**settings), is_weighted=weighted)
    cpu.train(training), cuda.train(training)
    bad = 2**40 if "hash_ids" in settings else -1
    for seed in range(2):
        lookup(cpu, cuda, batch(seed=seed, bad=bad, weighted=weighted))
    assert cuda.num_invalid_ids == cpu.num_invalid_ids
    assert (cpu.num_invalid_ids > 0) == ("hash_ids" not in settings)
    assert_same_state(cpu, cuda)


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
def test_all_options_together(weighted):
    cpu, cuda = twins(mixed_tables(), is_weighted=weighted)
    for seed in range(2):
        lookup(cpu, cuda, batch(26, seed=seed, bad=-1, weighted=weighted))
    assert cuda.num_invalid_ids == cpu.num_invalid_ids > 0
    assert_same_state(cpu, cuda)


@pytest.mark.parametrize(("option", "weighted"), [("track_seen", True), ("rare", False)])
def test_features_with_ids_of_their_own(option, weighted):
    cpu, cuda = twins(joint_tables(**OPTIONS[option]), is_weighted=weighted)
    lookup(cpu, cuda, batch(bad=-1, beyond=7, weighted=weighted))
    assert cuda.num_invalid_ids == cpu.num_invalid_ids
    assert_same_state(cpu, cuda)


def test_a_batch_size_per_feature_of_ids_of_their_own():
    ranges = {"f": range(100, 140), "g": range(40), "h": range(40, 80), "unused": range(100, 140)}
    shape = dict(num_embeddings=200, embedding_dim=16, num_rows=20)
    config = CCEEmbeddingBagConfig(
        name="joint", feature_names=list(ranges), id_ranges=ranges, **shape
    )
    cpu, cuda = twins([config])
    lookup(cpu, cuda, vbe_batch(0, False))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("option", ["none", "hash_ids", "track_seen"])
def test_types_of_ids(option, dtype):
    cpu, cuda = twins(two_tables(**OPTIONS[option]))
    lookup(cpu, cuda, batch(dtype=dtype, bad=-5))
    assert_same_state(cpu, cuda)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("option", ["none", "track_seen", "finalized"])
@pytest.mark.parametrize("mode", [BoundsCheckMode.WARNING, BoundsCheckMode.IGNORE])
def test_bad_ids_are_read_as_zero(mode, option, bad):
    cpu, cuda = twins(two_tables(**OPTIONS[option]), bounds_check_mode=mode)
    lookup(cpu, cuda, batch(bad=bad))
    assert cuda.num_invalid_ids == cpu.num_invalid_ids
    assert_same_state(cpu, cuda)


@pytest.mark.parametrize("bad", [None, *BAD])
@pytest.mark.parametrize("option", ["none", "track_seen", "hash_ids"])
def test_bad_ids_end_the_job_in_fatal_mode(option, bad):
    cpu, cuda = twins(two_tables(**OPTIONS[option]), bounds_check_mode=BoundsCheckMode.FATAL)
    features = batch(bad=bad)
    if bad is None or option == "hash_ids":
        lookup(cpu, cuda, features)
        return
    with pytest.raises(ValueError, match="is outside") as expected:
        cpu(features)
    with pytest.raises(ValueError, match="is outside") as got:
        cuda(features.to("cuda"))
    # How many there are is said where the host has counted them.
    same = [str(error.value).replace(";", " (").split(" (")[0] for error in (expected, got)]
    assert same[0] == same[1] and f"id {bad} is outside" in same[0]


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("option", ["none", "learned_codes=False", "track_seen", "hash_ids"])
def test_values_beyond_the_last_bag(option, weighted):
    cpu, cuda = twins(two_tables(**OPTIONS[option]), is_weighted=weighted)
    lookup(cpu, cuda, batch(beyond=7, bad=-1, weighted=weighted))
    assert cuda.num_invalid_ids == cpu.num_invalid_ids
    assert_same_state(cpu, cuda)


@pytest.mark.usefixtures("small_blocks")
def test_after_clusterings_the_kernel_reads_the_new_codes():
    cpu, cuda = twins(
        [table(0, num_embeddings=200), table(1, num_embeddings=200, num_chunks=1, num_rows=300)]
    )
    for _ in range(2):
        lookup(cpu, cuda, batch(num_ids=200))
        cluster(cuda, backend="torch", iterations=1)
        cpu.load_state_dict({name: on_cpu(t) for name, t in cuda.state_dict().items()})
    lookup(cpu, cuda, batch(num_ids=200))


@pytest.mark.parametrize("pooling", [PoolingType.SUM, PoolingType.MEAN])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
def test_a_batch_size_per_feature(weighted, pooling):
    cpu, cuda = twins(tables_of_the_sharded_tests(pooling), is_weighted=weighted)
    lookup(cpu, cuda, vbe_batch(0, weighted))


@pytest.mark.parametrize("option", ["none", "hash_ids", "track_seen"])
def test_sequences(option):
    tables = [table(0, **OPTIONS[option]), table(1, **OPTIONS[option])]
    cpu = CCEEmbeddingCollection(tables, need_indices=True)
    cuda = CCEEmbeddingCollection(tables, device="cuda", need_indices=True)
    cuda.load_state_dict(cpu.state_dict())
    features = batch(bad=-1)
    expected, got = cpu(features), cuda(features.to("cuda"))
    for name, one in expected.items():
        torch.testing.assert_close(on_cpu(got[name].values()), one.values())
        assert torch.equal(on_cpu(got[name].weights()), one.weights())
        assert torch.equal(on_cpu(got[name].lengths()), one.lengths())


def test_features_in_another_order_and_an_empty_batch():
    cpu, cuda = twins([table(1), table(0)])
    lookup(cpu, cuda, batch(3))
    empty = batch(3)
    none = torch.zeros(0, dtype=torch.int64)
    empty = type(empty)(empty.keys(), none, lengths=torch.zeros_like(empty.lengths()))
    assert not on_cpu(cuda(empty.to("cuda")).values()).any()


def test_the_kernel_is_what_ran(monkeypatch):
    """Equality says little if the device had gone the torch form's way."""
    calls, kernel = [], triton_expand.expand
    monkeypatch.setattr(triton_expand, "expand", lambda *a, **k: (calls.append(1), kernel(*a, **k)))
    cpu, cuda = twins(two_tables())
    cpu(batch()), cuda(batch().to("cuda"))
    assert len(calls) == 1
