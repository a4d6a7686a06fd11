"""torch.compile of a model that holds the collection."""

import pytest
import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from torch import nn
from torchrec import EmbeddingBagConfig, KeyedJaggedTensor

from cce_torchrec import CCEEmbeddingBagCollection, CCEEmbeddingBagConfig
from cce_torchrec.gpu.usable import interpreted
from cce_torchrec.lookup import native

by_operator = pytest.mark.skipif(
    interpreted() or not native.available(),
    reason="the expansion is not the operator: Triton's kernel is kept outside graphs",
)


class Model(nn.Module):
    def __init__(self, mode=BoundsCheckMode.WARNING):
        super().__init__()
        tables = [
            CCEEmbeddingBagConfig(
                name="t", num_embeddings=500, embedding_dim=16, feature_names=["f"], num_rows=9
            ),
            EmbeddingBagConfig(name="p", num_embeddings=50, embedding_dim=8, feature_names=["g"]),
        ]
        self.collection = CCEEmbeddingBagCollection(tables=tables, bounds_check_mode=mode)
        self.over = nn.Linear(24, 1)

    def forward(self, features):
        return self.over(self.collection(features).values()).sigmoid()


def test_compiled_model_trains_as_the_eager_one():
    models, outputs = [], []
    features = KeyedJaggedTensor(
        ["f", "g"], torch.arange(24) % 50, lengths=torch.tensor([3, 0, 5, 4, 6, 6])
    )
    for compiled in (False, True):
        torch.manual_seed(0)
        model = Model()
        models.append(model)
        # No code generation: graph capture, and falling back where it fails, is what is tested.
        called = torch.compile(model, backend="eager") if compiled else model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            out = called(features)
            out.sum().backward()
            optimizer.step()
        outputs.append(out.detach())
    torch.testing.assert_close(*outputs)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b)


def batch(size, bad=None):
    """`size` times as many ids; `bad` in place of some of them."""
    lengths = torch.tensor([3, 0, 5, 4, 6, 6]) * size
    ids = torch.arange(24 * size) % 50
    if bad is not None:
        ids[::5] = bad
    features = KeyedJaggedTensor(["f", "g"], ids, lengths=lengths)
    features.length_per_key()  # known, as from TorchRec's data pipes; to ask for it ends a graph
    return features


def pair(mode):
    """A model, its compiled form, and the graphs that are made of it."""
    models, graphs = [Model(mode), Model(mode)], []
    models[1].load_state_dict(models[0].state_dict())
    return models, graphs


def kept_in(graphs):
    """A backend that traces forward and backward, and keeps the graphs of forwards."""

    def backend(graph, example):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example)

    return backend


def called(graphs):
    return [node.target for graph in graphs for node in graph.graph.nodes]


@by_operator
def test_expansion_is_an_operator_of_one_graph():
    torch._dynamo.reset()
    (eager, other), graphs = pair(BoundsCheckMode.IGNORE)
    compiled = torch.compile(other, backend=kept_in(graphs), fullgraph=True)
    for size in (1, 2, 3):
        features = batch(size, bad=-1)
        expected, got = eager(features), compiled(features)
        assert torch.equal(expected, got)
        expected.sum().backward()
        got.sum().backward()
    for a, b in zip(eager.parameters(), other.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    assert called(graphs).count(torch.ops.cce_torchrec.expand.default) == len(graphs) <= 2


@by_operator
def test_graphs_follow_codes_that_change():
    torch._dynamo.reset()
    (eager, other), graphs = pair(BoundsCheckMode.IGNORE)
    compiled = torch.compile(other, backend=kept_in(graphs), fullgraph=True)
    before = compiled(batch(1))
    for model in (eager, other):
        codes = model.collection.codes["t"]
        codes.set_clusterings(1)
        codes.codes.fill_(3)
    after = compiled(batch(1))
    assert torch.equal(after, eager(batch(1))) and not torch.equal(after, before)


@by_operator
@pytest.mark.parametrize("scalars", [False, True])
def test_ids_out_of_bounds_are_counted_beside_the_graph(scalars):
    """Also where a job has graphs go on with numbers, as TorchRec's TrainPipelinePT2 does."""
    torch._dynamo.reset()
    (eager, other), graphs = pair(BoundsCheckMode.WARNING)
    with torch._dynamo.config.patch(capture_scalar_outputs=scalars):
        compiled = torch.compile(other, backend=kept_in(graphs))
        for bad in (None, -1, 500):
            assert torch.equal(eager(batch(1, bad)), compiled(batch(1, bad)))
    assert other.collection.num_invalid_ids == eager.collection.num_invalid_ids > 0
    assert torch.ops.cce_torchrec.expand.default in called(graphs)


def test_a_compiled_model_in_fatal_mode_names_the_id():
    torch._dynamo.reset()
    compiled = torch.compile(Model(BoundsCheckMode.FATAL), backend="eager")
    compiled(batch(1))
    with pytest.raises(ValueError, match="table 't', feature 'f': id -7 is outside"):
        compiled(batch(1, bad=-7))
