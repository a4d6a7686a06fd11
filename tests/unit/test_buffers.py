"""Lookups read the buffers, whoever wrote them: no copy of their state is kept elsewhere."""

import copy
import io

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchrec import KeyedJaggedTensor

from cce_torchrec import CCEEmbeddingBagCollection, CCEEmbeddingBagConfig
from cce_torchrec.clustering import cluster, finalize

IDS = KeyedJaggedTensor(["f", "g"], torch.arange(80) * 5, lengths=torch.full((40,), 2))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        tables = [
            CCEEmbeddingBagConfig(
                name="user", num_embeddings=500, embedding_dim=16, feature_names=["f"], num_rows=16
            ),
            # Of main rows that are a hash as well: without codes.
            CCEEmbeddingBagConfig(
                name="hashed", num_embeddings=500, embedding_dim=16, feature_names=["g"],
                num_rows=16, learned_codes=False,
            ),
        ]  # fmt: skip
        self.collection = CCEEmbeddingBagCollection(tables)

    def forward(self, features):
        return self.collection(features).values()

    def reset(self):
        """As a load that is in place."""
        for codes in self.collection.codes.values():
            codes.clusterings.copy_(torch.tensor(0))


def clustered():
    """A model after two clustering steps."""
    torch.manual_seed(1)
    model = Model()
    for _ in range(2):
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn_like(weight))
        cluster(model)
    return model


def used():
    """A model that has looked up already, by other codes."""
    torch.manual_seed(2)
    model = Model()
    model(IDS)
    return model


def tensors(model):
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def copied(source, tmp_path):
    target = used()
    with torch.no_grad():
        for name, value in tensors(target).items():
            value.copy_(tensors(source)[name])
    return target


def copied_by_data(source, tmp_path):
    target = used()
    for name, value in tensors(target).items():
        value.data.copy_(tensors(source)[name])
    return target


def copied_in_inference_mode(source, tmp_path):
    target = used()
    with torch.inference_mode():
        for name, value in tensors(target).items():
            value.copy_(tensors(source)[name])
        target(IDS)
    return target


def called_with(source, tmp_path):
    target = used()
    return lambda ids: torch.func.functional_call(target, tensors(source), (ids,))


def averaged(source, tmp_path):
    target = AveragedModel(used())
    target(IDS)
    target.update_parameters(source)
    return target


def loaded_in_place(source, tmp_path):
    target = used()
    dcp.save(source.state_dict(), checkpoint_id=tmp_path)
    dcp.load(target.state_dict(), checkpoint_id=tmp_path)
    return target


def loaded(source, tmp_path):
    target = used()
    target.load_state_dict(source.state_dict())
    return target


def assigned(source, tmp_path):
    target = used()
    target.load_state_dict(copy.deepcopy(source.state_dict()), assign=True)
    return target


def replaced(source, tmp_path):
    target = used()
    for name, part in source.collection.codes.items():
        target.collection.codes[name].clusterings = part.clusterings.clone()
        if part.codes is not None:
            target.collection.codes[name].codes = part.codes.clone()
    for own, other in zip(target.parameters(), source.parameters(), strict=True):
        own.data = other.data
    return target


def pickled(source, tmp_path):
    file = io.BytesIO()
    torch.save(copied(source, tmp_path), file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def deep_copied(source, tmp_path):
    return copy.deepcopy(copied(source, tmp_path))


def compiled(source, tmp_path):
    torch._dynamo.reset()
    target = used()
    graph = torch.compile(target, backend="eager")
    graph(IDS)
    with torch.no_grad():
        for name, value in tensors(target).items():
            value.copy_(tensors(source)[name])
    return graph


WAYS = [
    copied, copied_by_data, copied_in_inference_mode, called_with, averaged, loaded_in_place,
    loaded, assigned, replaced, pickled, deep_copied, compiled,
]  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_equal_buffers_give_equal_embeddings(way, tmp_path):
    source = clustered()
    target = way(source, tmp_path)
    assert torch.equal(target(IDS), source(IDS))


@pytest.mark.parametrize("way", [copied, assigned])
def test_the_next_clustering_step_goes_on_from_the_buffers(way, tmp_path):
    source = clustered()
    target = way(source, tmp_path)
    cluster(source)
    cluster(target)
    assert torch.equal(target(IDS), source(IDS))
    for name, value in tensors(source).items():
        assert torch.equal(tensors(target)[name], value), name


def test_codebooks_are_averaged_between_clusterings_and_afresh_after_each():
    """What the documents say: an average of codes as numbers would be codes of other clusters."""
    model, rows = clustered(), []
    for _ in range(2):
        ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
        rows = []
        for _ in range(3):
            with torch.no_grad():
                for weight in model.parameters():
                    weight.add_(0.1)
            ema.update_parameters(model)
            rows.append(model(IDS))
        cluster(model)
    expected = rows[0]
    for row in rows[1:]:
        expected = expected + 0.5 * (row - expected)
    torch.testing.assert_close(ema(IDS), expected)


def test_a_step_does_not_go_on_with_gradients_of_rows_of_before():
    """As where gradients are added up over more batches than the step comes after."""
    model = clustered()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(IDS).sum().backward()
    cluster(model, optimizer=optimizer)
    rows = {name: value.clone() for name, value in model.named_parameters()}
    optimizer.step()
    for name, value in model.named_parameters():
        # Tables whose codes are a hash have the rows that they had.
        assert torch.equal(value, rows[name]) == ("user" in name), name


@pytest.mark.parametrize("change", [cluster, lambda model: model.reset(), finalize])
def test_a_gradient_of_rows_of_before_is_refused(change):
    model = clustered()
    loss = model(IDS).sum()
    change(model)
    with pytest.raises(ValueError, match=r"tables \['hashed', 'user'\]: the codes changed between"):
        loss.backward()
    model(IDS).sum().backward()


def test_a_function_of_other_buffers_has_its_gradient_after_they_are_gone():
    source, model = clustered(), used()
    loss = torch.func.functional_call(model, tensors(source), (IDS,)).sum()
    loss.backward()
    assert all(weight.grad is not None for weight in source.parameters())
