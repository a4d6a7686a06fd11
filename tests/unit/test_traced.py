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
from tests.support.models import KEYS, MEAN, STRIDE, SUM, Model, Net, SequenceNet, batch, tables
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


def exported(module):
    """For any number of ids and bags."""

    class Values(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = module

        def forward(self, kjt):
            return flat(self.inner(kjt))

    kjt = batch(3, getattr(module, "is_weighted", bool)())
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


def test_an_exported_program_follows_a_clustering_step():
    module = made()
    graph, kjt = exported(module), batch(3, False)
    before = graph(kjt)
    cluster(module)
    torch.testing.assert_close(graph(kjt), module(kjt).values())
    assert not torch.equal(graph(kjt), before)


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
