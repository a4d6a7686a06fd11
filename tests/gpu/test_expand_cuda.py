"""Expansion on a CUDA device: the Triton kernel against the CPU, and no wait for the device."""

import pytest
import torch
import torch.distributed as dist
import torchrec
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from torch import nn
from torchrec import KeyedJaggedTensor
from torchrec.distributed import DistributedModelParallel
from torchrec.modules.embedding_configs import PoolingType
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from cce_torchrec import CCEEmbeddingBagCollection, CCEEmbeddingBagConfig
from cce_torchrec.clustering import cluster, finalize
from cce_torchrec.distributed.sharders import get_default_sharders
from cce_torchrec.planning import make_plan
from tests.support.ranks import free_port

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
N, B = 20_000, 64


def tables(**settings):
    return [
        CCEEmbeddingBagConfig(
            name=name, num_embeddings=N, embedding_dim=64, feature_names=[feature],
            num_rows=rows, pooling=pooling, **settings,
        )
        for name, feature, rows, pooling in (
            ("t", "f", 100, PoolingType.SUM),
            ("u", "g", 3000, PoolingType.MEAN),
        )
    ]  # fmt: skip


def batch(bad=None, weighted=False):
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, 6, (2 * B,), generator=g)
    ids = torch.randint(N, (int(lengths.sum()),), generator=g)
    if bad is not None:
        ids[::5] = bad
    weights = torch.rand(len(ids), generator=g) if weighted else None
    return KeyedJaggedTensor(["f", "g"], ids, weights, lengths=lengths)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.collection = CCEEmbeddingBagCollection(tables=tables())
        parameters = list(self.collection.parameters())
        apply_optimizer_in_backward(torchrec.optim.RowWiseAdagrad, parameters, {"lr": 0.1})

    def forward(self, features):
        return self.collection(features)


@pytest.fixture(scope="module")
def sharded():
    dist.init_process_group(
        "nccl", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1
    )
    torch.manual_seed(0)
    device, model = torch.device("cuda", 0), Model()
    plan = make_plan(model, tables(), device, "tw")
    yield DistributedModelParallel(model, device=device, plan=plan, sharders=get_default_sharders())
    dist.destroy_process_group()


def rows_of(model, features):
    module = model.module.collection
    context = module.create_context()
    arrived = module.input_dist(context, features).wait().wait()
    return module._expand(context, arrived)[0]


@pytest.mark.parametrize("bad", [None, -1, 2**40])
@pytest.mark.parametrize("change", [None, cluster, finalize])
def test_kernel_equals_the_cpu(sharded, bad, change):
    if change is not None:
        change(sharded)
    found = sharded.module.collection.num_invalid_ids
    features = batch(bad).pin_memory().to(torch.device("cuda", 0), non_blocking=True)
    got = rows_of(sharded, features)
    cpu = CCEEmbeddingBagCollection(tables=sharded.module.collection.embedding_bag_configs())
    for name, codes in cpu.codes.items():
        own = sharded.module.collection.codes[name]
        codes.codes.copy_(own.codes)
        codes.set_clusterings(own.num_clusterings)
    expected = cpu.expansion(batch(bad), cpu.bounds_check)
    by_key = expected.to_dict()
    for key, rows in got.to_dict().items():
        assert torch.equal(rows.values().cpu(), by_key[key].values()), key
        assert torch.equal(rows.lengths().cpu().long(), by_key[key].lengths().long()), key
    more = 0 if bad is None else len(batch().values()[::5])
    assert sharded.module.collection.num_invalid_ids - found == more


def test_no_wait_for_the_device(sharded):
    """Input distribution is left out: TorchRec's own reads lengths back to the host."""
    module = sharded.module.collection
    features = batch(-1).to(torch.device("cuda", 0))
    for strict in (False, True):  # the first call compiles and copies what it keeps
        context = module.create_context()
        arrived = module.input_dist(context, features).wait().wait()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if strict else "default")
        try:
            out = module.compute_and_output_dist(context, arrived).wait().values()
            out.backward(torch.ones_like(out))
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("option", [None, "hash_ids", "track_seen", "learned_codes"])
def test_unsharded_equals_the_cpu(option, weighted):
    """By the kernel, and by torch where ids are hashed or kept track of."""
    settings = {option: option != "learned_codes"} if option else {}
    bad = None if option == "hash_ids" else -1
    device = torch.device("cuda", 0)
    cpu = CCEEmbeddingBagCollection(tables(**settings), is_weighted=weighted)
    cuda = CCEEmbeddingBagCollection(tables(**settings), device=device, is_weighted=weighted)
    cuda.load_state_dict(cpu.state_dict())
    for _ in range(2):
        features = batch(bad, weighted)
        got, expected = cuda(features.to(device)).values(), cpu(features).values()
        torch.testing.assert_close(got.cpu(), expected)
        for module, out in ((cpu, expected), (cuda, got)):
            module.zero_grad()
            out.square().sum().backward()
    for (name, one), other in zip(cpu.named_parameters(), cuda.parameters(), strict=True):
        torch.testing.assert_close(other.grad.cpu(), one.grad, msg=name, rtol=1e-4, atol=1e-5)
    assert cuda.num_invalid_ids == cpu.num_invalid_ids
    if option == "track_seen":
        for name, codes in cpu.codes.items():
            assert torch.equal(cuda.codes[name].seen.cpu()[:-1], codes.seen[:-1])


@pytest.mark.parametrize("hash_ids", [False, True])
def test_features_with_ids_of_their_own(hash_ids):
    """One table of both features, without a wait for the device once it is described there."""
    device = torch.device("cuda", 0)
    fields = dict(num_embeddings=2 * N + 9, embedding_dim=64, num_rows=100, hash_ids=hash_ids)
    joint = CCEEmbeddingBagConfig(
        name="j", feature_names=["f", "g"], id_ranges={"f": range(N + 9, 2 * N + 9), "g": range(N)},
        **fields,
    )  # fmt: skip
    cpu = CCEEmbeddingBagCollection([joint])
    cuda = CCEEmbeddingBagCollection([joint], device=device)
    cuda.load_state_dict(cpu.state_dict())
    features = batch(None if hash_ids else -1)
    on_device = features.to(device)
    cuda(on_device)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        rows = cuda.expansion(on_device, cuda.bounds_check)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = cpu.expansion(features, cpu.bounds_check)
    assert torch.equal(rows.values().cpu(), expected.values())
    torch.testing.assert_close(cuda(on_device).values().cpu(), cpu(features).values())


def test_fatal_names_the_id():
    module = CCEEmbeddingBagCollection(
        tables(), device="cuda", bounds_check_mode=BoundsCheckMode.FATAL
    )
    with pytest.raises(ValueError, match=r"table 't', feature 'f': id -1 is outside"):
        module(batch(-1).to(torch.device("cuda", 0)))


def test_compiled_falls_back_at_the_kernel():
    module = CCEEmbeddingBagCollection(tables(), device="cuda")
    features = batch(-1).to(torch.device("cuda", 0))
    compiled = torch.compile(module, backend="eager")
    for _ in range(2):
        assert torch.equal(compiled(features).values(), module(features).values())
