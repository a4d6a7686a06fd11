"""Graphs of unsharded collections: torch.fx, TorchScript and torch.export give what lookups do."""

import copy
import io

import pytest
import torch
import torchrec.fx
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from torch.export import Dim
from torch.utils import _pytree as pytree
from torchrec import KeyedJaggedTensor

from cce_torchrec import (
    CCEEmbeddingBagCollection,
    CCEEmbeddingBagConfig,
    CCEEmbeddingCollection,
    cluster,
    finalize,
)
from tests.support.models import (
    KEYS,
    MEAN,
    STRIDE,
    SUM,
    Model,
    Net,
    SequenceNet,
    batch,
    tables,
    vbe_batch,
)
from tests.support.twins import flat


def configs():
    """Tables of every kind: SUM and MEAN, plain, of raw ids, without codes, without a helper."""
    shape = dict(num_embeddings=90, embedding_dim=8, num_rows=7, num_chunks=2)
    return [
        *tables(SUM)[:2],
        tables(MEAN)[2],
        CCEEmbeddingBagConfig(name="raw", feature_names=["f"], hash_ids=True, **shape),
        CCEEmbeddingBagConfig(name="hashed", feature_names=["g"], learned_codes=False, **shape),
        CCEEmbeddingBagConfig(name="main", feature_names=["h"], num_helper_rows=0, **shape),
    ]


def made(step=cluster, *, weighted=False):
    """A collection whose codes are no hashes any more."""
    out = CCEEmbeddingBagCollection(configs(), is_weighted=weighted)
    step(out)
    return out


def scripted(module):
    """As a server would have it: in TorchScript that was saved and loaded."""
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(module), file)
    file.seek(0)
    return torch.jit.load(file)


def exported(module, kjt=None):
    """For any number of ids and bags."""

    class Values(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = module

        def forward(self, kjt):
            return flat(self.inner(kjt))

    kjt = batch(3, getattr(module, "is_weighted", bool)()) if kjt is None else kjt
    leaves = pytree.tree_flatten(kjt)[0]
    dynamic = [None if leaf is None else {0: Dim.AUTO} for leaf in leaves]
    return torch.export.export(Values(), (kjt,), dynamic_shapes=(dynamic,), strict=False).module()


GRAPHS = {
    "torch.fx": torch.fx.symbolic_trace,
    "torchrec.fx": torchrec.fx.symbolic_trace,
    "TorchScript": scripted,
    "torch.export": exported,
}


def values(out):
    return out if isinstance(out, torch.Tensor) else flat(out)


@pytest.mark.parametrize(
    ("graph", "step", "weighted"),
    [
        *((graph, cluster, False) for graph in GRAPHS),
        ("torchrec.fx", finalize, False),
        ("torchrec.fx", cluster, True),
        ("TorchScript", finalize, True),
    ],
)
def test_pooled(graph, step, weighted):
    module = made(step, weighted=weighted)
    graph = GRAPHS[graph](module)
    for seed in (3, 4):
        kjt = batch(seed, weighted)
        expected, out = module(kjt), graph(kjt)
        torch.testing.assert_close(values(out), expected.values())
        if not isinstance(out, torch.Tensor):
            assert out.keys() == expected.keys()


@pytest.mark.parametrize("graph", GRAPHS)
def test_sequences(graph):
    module = CCEEmbeddingCollection(SequenceNet.configs(), need_indices=True)
    cluster(module)
    graph = GRAPHS[graph](module)
    for seed in (3, 4):
        kjt = batch(seed, False)
        expected, out = module(kjt), graph(kjt)
        torch.testing.assert_close(values(out), flat(expected))
        for name in expected if not isinstance(out, torch.Tensor) else ():
            assert torch.equal(out[name].lengths(), expected[name].lengths())
            assert torch.equal(out[name].weights(), expected[name].weights())


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids_out_of_bounds_read_id_0(dtype):
    module, kjt = made(), batch(3, False)
    ids, read = kjt.values().to(dtype), kjt.values().to(dtype)
    ids[::5], read[::5] = torch.tensor([-1, 2000], dtype=dtype)[torch.arange(7) % 2], 0
    graph = torchrec.fx.symbolic_trace(module)
    bad, good = (
        KeyedJaggedTensor(KEYS, v, lengths=kjt.lengths(), stride=STRIDE) for v in (ids, read)
    )
    keys = [name for name in module.output.names if "raw" not in name]  # where every id is one
    found, expected = graph(bad), module(good)
    for name in keys:
        torch.testing.assert_close(found[name], expected[name])


@pytest.mark.parametrize("net", [Net, SequenceNet])
def test_a_collection_in_a_model(net):
    model = net(net.configs())
    kjt = batch(3, False)
    torch.testing.assert_close(torchrec.fx.symbolic_trace(model)(kjt), model(kjt))


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("kind", ["bags", "sequences"])
def test_a_graph_follows_clustering_steps_and_loads(kind, graph):
    """It reads codes and numbers of clusterings where they are; what was saved is a copy."""
    modules = [
        CCEEmbeddingBagCollection(configs())
        if kind == "bags"
        else CCEEmbeddingCollection(SequenceNet.configs())
        for _ in range(2)
    ]
    graph = torch.jit.script if graph == "TorchScript" else GRAPHS[graph]
    graph, kjt = graph(modules[0]), batch(3, False)
    before = values(graph(kjt)).clone()
    cluster(modules[0])
    torch.testing.assert_close(values(graph(kjt)), flat(modules[0](kjt)))
    assert not torch.equal(values(graph(kjt)), before)
    for _ in range(2):
        cluster(modules[1])
    modules[0].load_state_dict(modules[1].state_dict())
    torch.testing.assert_close(values(graph(kjt)), flat(modules[1](kjt)))


def alike(inverse):
    """A batch whose features have as many bags each, of which examples have `inverse`."""
    ids = torch.arange(16)
    examples = (KEYS, torch.tensor([inverse] * len(KEYS)))
    return KeyedJaggedTensor(
        KEYS,
        ids,
        lengths=torch.tensor([1, 2, 1] * len(KEYS)),
        stride_per_key_per_rank=[[3]] * len(KEYS),
        inverse_indices=examples,
    )


EXAMPLES = {
    "unequal numbers of bags": vbe_batch(3, False),
    "bags in another order": alike([2, 1, 0]),
    "more examples than bags": alike([0, 1, 2, 1, 0]),
    "fewer examples than bags": alike([1]),
}


@pytest.mark.parametrize("graph", ["torch.fx", "torchrec.fx", "TorchScript"])
def test_examples_by_inverse_indices(graph):
    module = made()
    graph = GRAPHS[graph](module)
    for kjt in EXAMPLES.values():
        torch.testing.assert_close(values(graph(kjt)), module(kjt).values())


def test_examples_by_inverse_indices_exported():
    """A program of such a batch takes others of its kind, whose names are in one order."""
    module = made()
    graph = exported(module, alike([2, 1, 0]))
    for kjt in (alike([1, 1, 2]), alike([0, 0, 0])):
        torch.testing.assert_close(graph(kjt), module(kjt).values())


@pytest.mark.parametrize("graph", ["torch.fx", "TorchScript"])
@pytest.mark.parametrize("sizes", [[3, 3, 3, 3], [1, 2, 4, 5]])
@pytest.mark.parametrize(
    ("made_of", "message"),
    [
        (lambda: CCEEmbeddingBagCollection(tables(SUM)), "but no inverse_indices for .*f"),
        (lambda: CCEEmbeddingCollection(SequenceNet.configs()), "take one batch size for all"),
    ],
    ids=["bags", "sequences"],
)
def test_batch_sizes_per_feature_are_refused_as_in_eager_mode(made_of, message, sizes, graph):
    module = made_of()
    kjt = KeyedJaggedTensor(
        KEYS,
        torch.arange(12),
        lengths=torch.ones(12, dtype=torch.int64),
        stride_per_key_per_rank=[[size] for size in sizes],
    )
    for one in (module, GRAPHS[graph](module)):
        with pytest.raises((ValueError, torch.jit.Error), match=message):
            one(kjt)


def test_gradients():
    module = made()
    twin = copy.deepcopy(module)
    kjt = batch(3, False)
    torchrec.fx.symbolic_trace(module)(kjt).values().square().sum().backward()
    twin(kjt).values().square().sum().backward()
    for own, other in zip(module.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad)


@pytest.mark.parametrize("graph", GRAPHS)
def test_a_check_that_raises_is_refused(graph):
    module = CCEEmbeddingBagCollection(tables(SUM), bounds_check_mode=BoundsCheckMode.FATAL)
    with pytest.raises(ValueError, match="table 't': bounds_check_mode FATAL"):
        GRAPHS[graph](Model(module) if graph == "torchrec.fx" else module)
