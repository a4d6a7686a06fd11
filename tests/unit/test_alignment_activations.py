"""Activations of two models: the same measures as of all of them at once."""

import pytest
import torch
from torch import nn
from torchrec import EmbeddingBagConfig, EmbeddingConfig, KeyedJaggedTensor
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from cce_torchrec.alignment import (
    LiveTable,
    Weight,
    align,
    align_activations,
    debiased_cka,
    linear_cka,
    moments,
    neighbourhoods,
)


class Tower(nn.Module):
    def __init__(self, seed, width=7):
        super().__init__()
        torch.manual_seed(seed)
        self.hidden = nn.Sequential(nn.Linear(5, width), nn.ReLU())
        self.drop = nn.Dropout(0.5)
        self.out = nn.Linear(width, 1)

    def forward(self, x):
        return self.out(self.drop(self.hidden(x))).squeeze(1)


def batches(count=6, size=50):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(size, 5, generator=g) for _ in range(count)]


def test_a_layer_is_compared_as_if_all_examples_were_one_batch():
    a, b = Tower(1), Tower(2, width=9)
    b.drop.eval()
    found = align_activations(a, b, batches(), layer="hidden", k=4)
    x, y = (model.hidden(torch.cat(batches())).detach() for model in (a, b))
    sums = moments([(x.double(), y.double())])
    assert found.ids == 300 and found.codes is None
    assert found.linear_cka.value == pytest.approx(linear_cka(sums), rel=1e-5)
    assert found.debiased_cka.value == pytest.approx(debiased_cka(sums), rel=1e-4)
    assert found.linear_cka.low < found.linear_cka.value < found.linear_cka.high
    near = neighbourhoods(x, y, 4)  # of the same examples in the order of their hashes
    assert found.neighbours.overlap.value == pytest.approx(near.overlap.value)
    assert a.training and a.drop.training and not b.drop.training and b.training


def test_dropout_is_off_and_the_whole_model_is_a_layer():
    a = Tower(1)
    assert align_activations(a, a, batches(), layer="drop").linear_cka.value == pytest.approx(1)
    assert align_activations(a, a, batches()).mean_cca.value == pytest.approx(1)
    two = align_activations(a, a, batches(), layer=("hidden", "hidden.0"))
    assert 0 < two.linear_cka.value < 1


def test_neighbours_are_those_of_a_sample_whatever_the_batches():
    a, b = Tower(1), Tower(2)
    one = align_activations(a, b, batches(), layer="hidden", sample=90).neighbours
    other = align_activations(a, b, [torch.cat(batches())], layer="hidden", sample=90).neighbours
    assert one.ids == other.ids == 90
    assert one.overlap.value == pytest.approx(other.overlap.value)


def test_an_own_way_to_run_a_model():
    a = Tower(1)
    pairs = [{"x": batch} for batch in batches()]
    found = align_activations(a, a, pairs, forward=lambda model, batch: model(batch["x"]))
    assert found.ids == 300


class Twice(Tower):
    def forward(self, x):
        return self.hidden(x) + self.hidden(x)


class Codes(nn.Module):
    def forward(self, x):
        return (x > 0).long()


@pytest.mark.parametrize(
    ("a", "layer", "message"),
    [
        (Tower(1), "hiden", r"no layer 'hiden'; there are \['hidden', 'hidden.0'"),
        (Twice(1), "hidden", "layer 'hidden' ran 2 times for a batch"),
        (Codes(), "", "gives no floating-point tensor of examples, but torch.int64 of 2"),
    ],
)
def test_layers_that_cannot_be_compared(a, layer, message):
    with pytest.raises(ValueError, match=message):
        align_activations(a, a, batches(), layer=layer)
    assert not [hook for module in a.modules() for hook in module._forward_hooks]


def test_no_batches_constant_and_unequal_activations():
    a = Tower(1)
    with pytest.raises(ValueError, match="there are none"):
        align_activations(a, a, [])
    with torch.no_grad():
        a.out.weight.zero_()
    with pytest.raises(ValueError, match="all ids of the first table have the same vector"):
        align_activations(a, a, batches())
    with pytest.raises(ValueError, match="give 50 and 10 examples"):
        align_activations(a, Tower(1), batches(), forward=lambda m, x: m(x if m is a else x[:10]))


def test_embeddings_of_a_collection_are_activations():
    def model(seed):
        torch.manual_seed(seed)
        own = EmbeddingBagConfig(
            name="t", embedding_dim=4, num_embeddings=20, feature_names=["f", "g"]
        )
        return EmbeddingBagCollection(tables=[own])

    batch = KeyedJaggedTensor(
        keys=["f", "g"], values=torch.arange(40) % 20, lengths=torch.ones(40, dtype=torch.int64)
    )
    a, b = model(1), model(2)
    found = align_activations(a, b, [batch])
    x, y = (own(batch).values().detach().double() for own in (a, b))
    assert found.linear_cka.value == pytest.approx(linear_cka(moments([(x, y)])), rel=1e-5)


def unequal(features):
    configs = [
        EmbeddingBagConfig(name="small", embedding_dim=4, num_embeddings=10, feature_names=["f"]),
        EmbeddingBagConfig(
            name="large", embedding_dim=4, num_embeddings=30, feature_names=features
        ),
    ]
    return EmbeddingBagCollection(tables=configs), configs


def test_a_feature_that_fewer_ids_read_is_not_looked_up():
    collection, configs = unequal(["f", "g"])
    weight = collection.embedding_bags["large"].weight
    found = align(LiveTable(collection, configs, "large"), Weight(weight))
    assert found.ids == 30 and found.linear_cka.value == pytest.approx(1)
    collection, configs = unequal(["f"])
    with pytest.raises(ValueError, match=r"'f' is read by table 'small' too, which has 10 ids of"):
        LiveTable(collection, configs, "large")
    assert LiveTable(collection, configs, "small").num_embeddings == 10


def test_sequences_have_tables_too():
    config = EmbeddingConfig(name="t", embedding_dim=4, num_embeddings=30, feature_names=["f"])
    collection = EmbeddingCollection(tables=[config])
    weight = collection.embeddings["t"].weight
    found = align(LiveTable(collection, [config], "t"), Weight(weight))
    assert found.linear_cka.value == pytest.approx(1)
    assert found.neighbours.overlap.value == pytest.approx(1)
