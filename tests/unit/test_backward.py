"""The compiled backward trains as FBGEMM's own does, and leaves to it what it does not do."""

import copy
import types
from pathlib import Path

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import (
    BoundsCheckMode,
    EmbeddingLocation,
    PoolingMode,
)
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
    WeightDecayMode,
)

from cce_torchrec import compiled
from cce_torchrec.lookup import native
from cce_torchrec.lookup.backward import MAX_BYTES, CodebookBags, take_over

pytestmark = pytest.mark.skipif(not native.available(), reason="built without a C++ compiler")
BAGS = 23


def kernel(tables, feature_table_map=None, **options):
    torch.manual_seed(0)
    module = SplitTableBatchedEmbeddingBagsCodegen(
        [(*shape, EmbeddingLocation.HOST, ComputeDevice.CPU) for shape in tables],
        feature_table_map=feature_table_map,
        **{
            "bounds_check_mode": BoundsCheckMode.NONE,
            "optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
            "learning_rate": 0.1,
            **options,
        },
    )
    module.init_embedding_weights_uniform(-1, 1)
    return module


def batch(rows, seed=0, weighted=False):
    """Bags of 0 to 5 of each feature's rows, some of them more than once in a bag."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 6, (len(rows) * BAGS,), generator=g)
    of_feature = lengths.view(len(rows), -1).sum(1).tolist()
    indices = torch.cat(
        [torch.randint(n, (k,), generator=g) for n, k in zip(rows, of_feature, strict=True)]
    )
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    return indices, offsets, torch.rand(len(indices), generator=g) if weighted else None


def both(*args, **options):
    """FBGEMM's module, and a copy that is taken over."""
    theirs = kernel(*args, **options)
    ours = copy.deepcopy(theirs)
    take_over(ours)
    assert type(ours) is CodebookBags
    return theirs, ours


def train(modules, inputs, grad, ours=True):
    """A step of each, the second by our backward; output, weights, optimizer state are compared."""
    outputs = [module(*inputs) for module in modules]
    assert (type(outputs[1].grad_fn).__name__ == "_LookupBackward") == ours
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
    for output in outputs:
        output.backward(grad(output))
    compare(*modules)


def compare(theirs, ours):
    for a, b in zip(theirs.split_embedding_weights(), ours.split_embedding_weights(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    states = (theirs.split_optimizer_states(), ours.split_optimizer_states())
    for (a,), (b,) in zip(*states, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def random_grad(output):
    return torch.randn(output.shape, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("weighted", [False, True])
def test_trains_as_fbgemm_does(weighted, threads):
    """Every width that is compiled, tables longer and shorter than a batch, several features."""
    tables = [(50, 4), (7, 8), (900, 12), (1, 16), (33, 32), (64, 64), (200, 100), (1500, 4)]
    of = [0, 1, 1, 2, 3, 4, 4, 4, 5, 6, 7]
    modules = both(tables, of)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for seed in range(4):
            inputs = batch([tables[t][0] for t in of], seed, weighted)
            train(modules, inputs, random_grad)
    finally:
        torch.set_num_threads(before)


def test_result_does_not_depend_on_threads():
    tables = [(100, 16)] * 5
    inputs, results = batch([100] * 5), []
    before = torch.get_num_threads()
    for threads in (1, 2, 5):
        module = both(tables)[1]
        torch.set_num_threads(threads)
        try:
            output = module(*inputs)
            output.backward(random_grad(output))
        finally:
            torch.set_num_threads(before)
        results.append(torch.cat([w.flatten() for w in module.split_embedding_weights()]))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize(
    "grad",
    [
        pytest.param(lambda output: torch.ones(()).expand_as(output), id="one number for all"),
        pytest.param(lambda output: random_grad(output.t()).t(), id="columns one by one"),
        pytest.param(
            lambda output: random_grad(torch.empty(BAGS, 99))[:, : output.shape[1]], id="a part"
        ),
    ],
)
def test_gradients_of_any_stride(grad):
    train(both([(30, 16), (40, 8)]), batch([30, 40]), grad)


def test_follows_learning_rate_and_weights():
    """Rates set by a schedule, weights and state that are loaded or moved between steps."""
    theirs, ours = both([(30, 16)], eps=1e-3)
    train([theirs, ours], batch([30]), random_grad)
    for module in (theirs, ours):
        module.set_learning_rate(0.7)
    train([theirs, ours], batch([30], seed=1), random_grad)
    for module in (theirs, ours):
        module.split_optimizer_states()[0][0].fill_(3.0)
        module.weights_host = torch.nn.Parameter(module.weights_host.detach() * 2)
    train([theirs, ours], batch([30], seed=2), random_grad)
    for module in (theirs, ours):
        module.momentum1_host = torch.nn.Parameter(module.momentum1_host.detach() * 2)
    train([theirs, ours], batch([30], seed=3), random_grad)


def test_inputs_of_any_stride():
    inputs = [torch.stack([t, t + 1], 1)[:, 0] for t in batch([30], weighted=True)]
    train(both([(30, 16)]), inputs, random_grad)


def test_rates_are_those_of_the_lookup():
    modules, inputs = both([(30, 16)]), batch([30])
    for module in modules:
        output = module(*inputs)
        module.update_hyper_parameters({"lr": 0.7, "eps": 10.0})
        output.backward(random_grad(output))
    compare(*modules)


def test_ids_out_of_bounds_are_row_0():
    indices, offsets, _ = batch([30])
    indices[3] = 30
    modules = both([(30, 16)], bounds_check_mode=BoundsCheckMode.IGNORE)
    train(modules, (indices, offsets), random_grad)


def test_a_converted_module_is_fbgemms():
    """float16 rows are not read as float32."""
    messages = []
    for module in both([(30, 16)]):
        output = module.half()(*batch([30]))
        with pytest.raises(RuntimeError) as refused:
            output.sum().backward()
        messages.append(str(refused.value))
    assert messages[0] == messages[1]


def test_steps_of_two_threads_share_no_buffers(monkeypatch):
    _, module = both([(30, 16)])
    compiled, buffers = native.kernels(), []
    losses = [module(*batch([30])).sum() for _ in range(3)]
    losses[2].backward()

    def interrupted(*args):
        buffers.append(args[5])
        if len(buffers) == 1:  # another step comes in between
            losses[1].backward()
        compiled.cce_rowwise_adagrad(*args)

    monkeypatch.setattr(
        native, "kernels", lambda: types.SimpleNamespace(cce_rowwise_adagrad=interrupted)
    )
    losses[0].backward()
    assert len(set(buffers)) == 2


@pytest.mark.parametrize("weighted", [False, True])
def test_the_operator_does_the_same(monkeypatch, weighted):
    _, direct = both([(50, 16), (7, 8)], [0, 0, 1])
    traced, inputs = copy.deepcopy(direct), batch([50, 50, 7], weighted=weighted)
    for module in (direct, traced):
        monkeypatch.setattr(native, "is_traced", lambda tensor, ops=module is traced: ops)
        output = module(*inputs)
        output.backward(random_grad(output))
    assert torch.equal(direct.weights_host, traced.weights_host)
    assert torch.equal(direct.momentum1_host, traced.momentum1_host)


def test_a_copy_trains_by_itself():
    theirs, ours = both([(30, 16)])
    train([theirs, ours], batch([30]), random_grad)
    twin, before = copy.deepcopy(ours), ours.weights_host.detach().clone()
    train([theirs, twin], batch([30], seed=1), random_grad)
    assert torch.equal(ours.weights_host, before)


def test_without_grad_nothing_trains():
    theirs, ours = both([(30, 16)])
    inputs = batch([30])
    with torch.no_grad():
        assert not ours(*inputs).requires_grad
    assert torch.equal(theirs.weights_host, ours.weights_host)


def test_weights_that_want_a_gradient_get_fbgemms():
    modules, (indices, offsets, weights) = both([(30, 16)]), batch([30], weighted=True)
    grads = []
    for module in modules:
        per_sample = weights.clone().requires_grad_()
        output = module(indices, offsets, per_sample)
        output.backward(random_grad(output))
        grads.append(per_sample.grad)
    assert torch.equal(*grads)
    compare(*modules)


def test_a_batch_of_few_rows_is_fbgemms():
    tables = [(10_000, 16), (30, 16)]
    train(both(tables), batch([10_000, 30]), random_grad, ours=False)


def test_other_index_types_and_batch_sizes_per_feature():
    indices, offsets, _ = batch([30, 30])
    theirs, ours = both([(30, 16), (30, 16)])
    train([theirs, ours], (indices.int(), offsets.int(), None), random_grad, ours=False)
    for module in (theirs, ours):
        output = module(indices, offsets, batch_size_per_feature_per_rank=[[BAGS], [BAGS]])
        output.backward(random_grad(output))
    compare(theirs, ours)


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": EmbOptimType.EXACT_ADAGRAD},
        {"weights_precision": SparseType.FP16},
        {"output_dtype": SparseType.FP16},
        {"pooling_mode": PoolingMode.MEAN},
        {"weight_decay": 0.1},
        {"weight_decay_mode": WeightDecayMode.DECOUPLE},
        {"gradient_clipping": True, "max_gradient": 1.0},
        {"max_norm": 1.0},
        {"embedding_table_index_type": torch.int32},
        {"feature_table_map": [0, 1, 0]},
        {"tables": [(30, 16), (MAX_BYTES // 64 + 1, 16)]},
        {"tables": [(0, 16)]},
    ],
    ids=lambda options: "-".join(map(str, options)),
)
def test_leaves_everything_else_to_fbgemm(options):
    module = kernel(**{"tables": [(30, 16), (30, 16)], **options})
    take_over(module)
    assert type(module) is SplitTableBatchedEmbeddingBagsCodegen


def test_leaves_subclasses_alone():
    class Other(SplitTableBatchedEmbeddingBagsCodegen):
        pass

    module = kernel([(30, 16)])
    module.__class__ = Other
    take_over(module)
    assert type(module) is Other


def test_without_a_compiler_fbgemm_does_it(monkeypatch):
    monkeypatch.setattr(native, "available", lambda: False)
    module = kernel([(30, 16)])
    take_over(module)
    assert type(module) is SplitTableBatchedEmbeddingBagsCodegen


def test_a_library_of_older_sources_is_not_used(monkeypatch):
    """As after an update without an installation: torch and FBGEMM do the work."""
    older = types.SimpleNamespace(cce_expand=types.SimpleNamespace())
    monkeypatch.setattr(compiled.ctypes, "CDLL", lambda file: older)
    folder, functions = Path(native.__file__).parent, ("cce_expand", "cce_rowwise_adagrad")
    assert compiled.library.__wrapped__(folder, functions) is None
