"""Sharded collections on one rank, against the unsharded one on the CPU.

The process group is gloo's: which collectives are called on what is checked, not NCCL. FBGEMM's
lookup and update are its CPU forms over the same memory (stand_ins.py). Left to a real device:
sequences and a batch size per feature (FBGEMM's output has another form there), data-parallel
tables (DistributedDataParallel is C++), tables in unified memory and the pipelines that prefetch.
"""

import pytest
import torch
import torch.distributed as dist
import torchrec
from torch import nn
from torchrec.distributed import DistributedModelParallel
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from cce_torchrec import CCEEmbeddingBagCollection
from cce_torchrec.checkpoint import load_checkpoint, save_checkpoint
from cce_torchrec.clustering import cluster, finalize
from cce_torchrec.clustering.local_chunks import fused_rows, unsharded_rows
from cce_torchrec.distributed.sharders import get_default_sharders
from cce_torchrec.planning import make_plan
from tests.desk.counts import counting
from tests.desk.emulated import CUDA, Emulated, on_cpu
from tests.desk.twins import OPTIONS, batch, plain, table
from tests.support.ranks import free_port


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    address = f"tcp://127.0.0.1:{free_port()}"
    dist.init_process_group("gloo", init_method=address, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Model(nn.Module):
    def __init__(self, device="cpu", weighted=False, **settings):
        super().__init__()
        tables = [table(0, **settings), plain(1), table(2, **{"num_rows": 300, **settings})]
        torch.manual_seed(0)
        self.collection = CCEEmbeddingBagCollection(tables, is_weighted=weighted)
        parameters = list(self.collection.parameters())
        # FBGEMM's eps; TorchRec's own row-wise Adagrad has 1e-10.
        optimizer = torchrec.optim.RowWiseAdagrad
        apply_optimizer_in_backward(optimizer, parameters, {"lr": 0.1, "eps": 1e-8})

    def forward(self, features):
        return self.collection(features)


def sharded_twins(kind, weighted=False, **settings):
    cpu, model = Model(weighted=weighted, **settings), Model(weighted=weighted, **settings)
    plan = make_plan(model, model.collection.embedding_bag_configs(), CUDA, kind)
    sharders = get_default_sharders()
    cuda = DistributedModelParallel(model, device=CUDA, plan=plan, sharders=sharders)
    source = unsharded_rows(cpu.collection, None)
    for name, (weight, _) in fused_rows(cuda.module.collection).items():
        assert isinstance(weight, Emulated)
        on_cpu(weight).copy_(source[name][0])
    return cpu, cuda


def copy_rows(cuda, cpu):
    rows = fused_rows(cuda.module.collection)
    for name, (weight, _) in unsharded_rows(cpu.collection, None).items():
        weight.copy_(on_cpu(rows[name][0]))


def step(cpu, cuda, features):
    expected = cpu(features).values()
    got = cuda(features.to("cuda")).wait().values()
    torch.testing.assert_close(on_cpu(got), expected, rtol=1e-4, atol=1e-5)
    expected.square().sum().backward()
    got.square().sum().backward()


def assert_same_rows(cpu, cuda):
    rows = unsharded_rows(cpu.collection, None)
    for name, (weight, _) in fused_rows(cuda.module.collection).items():
        torch.testing.assert_close(on_cpu(weight), rows[name][0], rtol=1e-4, atol=1e-5, msg=name)
    for name, codes in cuda.module.collection.codes.items():
        if codes.seen is not None:
            own = cpu.collection.codes[name].seen
            assert torch.equal(on_cpu(codes.seen)[:-1], own[:-1]), name


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("option", ["none", "hash_ids", "track_seen", "learned_codes=False"])
@pytest.mark.parametrize("kind", ["tw", "cw", "rw"])
def test_steps_equal_the_unsharded_collection(kind, option, weighted):
    cpu, cuda = sharded_twins(kind, weighted, **OPTIONS[option])
    for seed in range(2):
        step(cpu, cuda, batch(3, seed=seed, bad=-1, weighted=weighted))
    assert_same_rows(cpu, cuda)
    assert cuda.module.collection.num_invalid_ids == cpu.collection.num_invalid_ids


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("kind", ["tw", "rw"])
@pytest.mark.parametrize("change", [cluster, finalize])
def test_lookups_after_a_clustering(change, kind):
    cpu, cuda = sharded_twins(kind, num_rows=5, num_embeddings=200)
    step(cpu, cuda, batch(3, num_ids=200))
    copy_rows(cuda, cpu)  # gradients differ in their last bits
    one, other = (change(m, backend="torch", iterations=2) for m in (cpu, cuda))
    for a, b in zip(one.chunks, other.chunks, strict=True):
        assert b.objective_before == pytest.approx(a.objective_before, rel=1e-6)
        assert b.objective_after == pytest.approx(a.objective_after, rel=1e-6)
    own = cuda.module.collection
    copy_rows(cuda, cpu)
    for name, codes in cpu.collection.codes.items():
        codes.codes.copy_(on_cpu(own.codes[name].codes))
        codes.set_clusterings(own.codes[name].num_clusterings)
    features = batch(3, seed=2, num_ids=200)
    got = cuda(features.to("cuda")).wait().values()
    torch.testing.assert_close(on_cpu(got), cpu(features).values())


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("option", ["none", "learned_codes=False", "hash_ids", "track_seen"])
def test_a_step_of_counted_ids_waits_for_nothing(option, weighted):
    """From the batch to the gradients; only ids that nobody has counted are waited for."""
    _, cuda = sharded_twins("tw", **OPTIONS[option])
    for seed in range(2):
        features = batch(3, seed=seed, weighted=weighted)
        features.length_per_key()  # on the CPU
        features = features.to("cuda")
        with counting() as counts:
            cuda(features).wait().values().square().sum().backward()
    assert counts.num_waits == 0, str(counts)


@pytest.mark.parametrize("kind", ["tw", "rw"])
def test_a_checkpoint_is_resumed(tmp_path, kind):
    cpu, cuda = sharded_twins(kind, num_rows=9, track_seen=True)
    step(cpu, cuda, batch(3))
    save_checkpoint(tmp_path, cuda, step=1)
    _, other = sharded_twins(kind, num_rows=9, track_seen=True)
    assert load_checkpoint(tmp_path, other).dropped == []
    state = other.module.collection.state_dict()
    for name, value in cuda.module.collection.state_dict().items():
        held = [getattr(t, "local_tensor", lambda t=t: t)() for t in (value, state[name])]
        assert torch.equal(*map(on_cpu, held)), name
    features = batch(3, seed=1)
    for _ in range(2):  # the optimizer's state too
        outs = [model(features.to("cuda")).wait().values() for model in (cuda, other)]
        assert torch.equal(*map(on_cpu, outs))
        for out in outs:
            out.square().sum().backward()
