"""Sequences, batch sizes that vary by feature, CUDA graphs and values beyond the last bag."""

import pytest
import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from torchrec import KeyedJaggedTensor
from torchrec.distributed import DistributedModelParallel
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from cce_torchrec import CCEEmbeddingBagCollection, CCEEmbeddingBagConfig, CCEEmbeddingCollection
from cce_torchrec.clustering.local_chunks import fused_rows
from cce_torchrec.distributed.sharders import get_default_sharders
from cce_torchrec.planning import make_plan
from tests.support.models import Model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
N, B, K = 5000, 32, 40
CUDA = torch.device("cuda", 0)


def tables(**settings):
    return [
        CCEEmbeddingBagConfig(
            name=name, num_embeddings=N, embedding_dim=16, feature_names=[name], num_rows=K,
            **settings,
        )
        for name in ("f", "g")
    ]  # fmt: skip


def batch(seed=0, beyond=0):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 5, (2 * B,), generator=g)
    ids = torch.randint(N, (int(lengths.sum()) + beyond,), generator=g)
    return KeyedJaggedTensor(["f", "g"], ids, lengths=lengths)


def twins(made, *args, **settings):
    cpu, cuda = made(*args, **settings), made(*args, device=CUDA, **settings)
    cuda.load_state_dict(cpu.state_dict())
    return cpu, cuda


def test_sequences_equal_the_cpu():
    cpu, cuda = twins(CCEEmbeddingCollection, tables())
    for seed in range(2):
        got, expected = cuda(batch(seed).to(CUDA)), cpu(batch(seed))
        for name, jagged in expected.items():
            torch.testing.assert_close(got[name].values().cpu(), jagged.values())
            assert torch.equal(got[name].lengths().cpu(), jagged.lengths())


@pytest.mark.usefixtures("one_rank")
def test_sharded_sequences_train():
    """Outputs are what codes and codebooks say, before and after a step."""
    torch.manual_seed(0)
    model = Model(CCEEmbeddingCollection(tables()))
    parameters = list(model.collection.parameters())
    apply_optimizer_in_backward(torch.optim.SGD, parameters, {"lr": 0.1})
    plan = make_plan(model, tables(), CUDA, "tw")
    model = DistributedModelParallel(model, device=CUDA, plan=plan, sharders=get_default_sharders())
    bags = model.module.collection.bags
    for seed in range(2):
        features = batch(seed).to(CUDA)
        out = model(features).wait()
        rows = fused_rows(bags)
        for name in ("f", "g"):
            ids, codes = features[name].values(), bags.codes[name]
            helper = codes.helper_rows(ids)
            main = codes.main_rows(ids)
            chunks = [rows[f"{name}#{j}"][0] for j in range(4)]
            expected = [c[main[j]] + c[K + helper[j]] for j, c in enumerate(chunks)]
            torch.testing.assert_close(out[name].values(), torch.cat(expected, dim=1))
        before = rows["f#0"][0].clone()
        sum(jagged.values().square().sum() for jagged in out.values()).backward()
        assert not torch.equal(before, fused_rows(bags)["f#0"][0])


@pytest.mark.usefixtures("one_rank")
def test_values_beyond_the_last_bag_train_nothing():
    """The same outputs and codebooks as without them."""
    found = []
    for beyond in (0, 500):
        torch.manual_seed(0)
        model = Model(CCEEmbeddingBagCollection(tables()))
        parameters = list(model.collection.parameters())
        apply_optimizer_in_backward(torch.optim.SGD, parameters, {"lr": 0.1})
        plan = make_plan(model, tables(), CUDA, "tw")
        model = DistributedModelParallel(
            model, device=CUDA, plan=plan, sharders=get_default_sharders()
        )
        for seed in range(3):
            # TorchRec validates the first batch, and refuses them there.
            out = model(batch(seed, beyond if seed else 0).to(CUDA)).values()
            out.square().sum().backward()
        rows = fused_rows(model.module.collection)
        found.append([out.detach(), *(rows[name][0].clone() for name in sorted(rows))])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_a_batch_size_per_feature_equals_the_cpu():
    cpu, cuda = twins(CCEEmbeddingBagCollection, tables())
    lengths = torch.tensor([2, 0, 1, 3, 1])
    features = KeyedJaggedTensor(
        ["f", "g"], torch.arange(7) * 700, lengths=lengths, stride_per_key_per_rank=[[2], [3]]
    )
    one = cpu.expansion(features, cpu.bounds_check)
    other = cuda.expansion(features.to(CUDA), cuda.bounds_check)
    assert torch.equal(one.values(), other.values().cpu())
    assert torch.equal(one.lengths().long(), other.lengths().cpu().long())
    assert one.stride_per_key() == other.stride_per_key()


@pytest.mark.usefixtures("one_rank")
def test_a_batch_size_per_feature_trains_as_every_example_does():
    """Over two FBGEMM modules, as tables are summed and averaged."""
    from tests.support.models import every_example, vbe_batch
    from tests.support.models import tables as several

    def configs():
        plain = EmbeddingBagConfig(name="mean", num_embeddings=40, embedding_dim=8,
                                   feature_names=["g"], pooling=PoolingType.MEAN)  # fmt: skip
        return [*several(PoolingType.SUM), plain]

    def made():
        torch.manual_seed(0)
        model = Model(CCEEmbeddingBagCollection(configs()))
        parameters = list(model.collection.parameters())
        apply_optimizer_in_backward(torch.optim.SGD, parameters, {"lr": 0.1})
        plan = make_plan(model, configs(), CUDA, "tw")
        return DistributedModelParallel(
            model, device=CUDA, plan=plan, sharders=get_default_sharders()
        )

    # One for each kind of batch: TorchRec's output distribution takes the kind it saw first.
    by_feature, by_example = made(), made()
    for seed in range(2):
        features = vbe_batch(seed, False)
        whole = by_example(every_example(features).to(CUDA)).wait().values()
        out = by_feature(features.to(CUDA)).wait().values()
        torch.testing.assert_close(out, whole)
        for found in (out, whole):
            found.square().sum().backward()


def test_a_cuda_graph_replays_the_expansion_and_refuses_fatal():
    warning = CCEEmbeddingBagCollection(tables(), device=CUDA)
    fatal = CCEEmbeddingBagCollection(tables(), CUDA, bounds_check_mode=BoundsCheckMode.FATAL)
    features, other = batch(0).to(CUDA), batch(0).to(CUDA)
    features.length_per_key(), other.length_per_key()
    for module in (warning, fatal):
        module.expansion(features, module.bounds_check)  # compiles, and makes what is kept
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rows = warning.expansion(features, warning.bounds_check)
    features.values().copy_(torch.randint(N, features.values().shape, device=CUDA))
    other.values().copy_(features.values())
    graph.replay()
    expected = warning.expansion(other, warning.bounds_check)
    assert torch.equal(rows.values(), expected.values())
    with (
        pytest.raises(ValueError, match="FATAL reads ids out of bounds back"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        fatal.expansion(features, fatal.bounds_check)


def test_a_compiled_model_in_fatal_mode_names_the_id():
    module = CCEEmbeddingBagCollection(tables(), CUDA, bounds_check_mode=BoundsCheckMode.FATAL)
    compiled = torch.compile(module, backend="eager")
    features = batch(0)
    features.values()[3] = N
    with pytest.raises(ValueError, match=f"id {N} is outside"):
        compiled(features.to(CUDA))
