"""What a CCE collection has in common with TorchRec's beyond the lookup: devices, modules, keys."""

import copy

import pytest
import torch
from torchrec import (
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    EmbeddingConfig,
    KeyedJaggedTensor,
)
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.optimizers import in_backward_optimizer_filter

from cce_torchrec import (
    CCEEmbeddingBagCollection,
    CCEEmbeddingBagConfig,
    CCEEmbeddingCollection,
    compress_model,
    finalize,
)
from tests.support.models import MEAN, SUM, Model, SequenceNet, batch, tables, vbe_batch

META = torch.device("meta")
MADE = {
    "bags": lambda: CCEEmbeddingBagCollection(tables(SUM)),
    "means with weights": lambda: CCEEmbeddingBagCollection(tables(MEAN), is_weighted=True),
    "sequences": lambda: CCEEmbeddingCollection(SequenceNet.configs()),
}


def _in_context(make):
    with META:
        return make()


def _by_default(make):
    torch.set_default_device(META)
    try:
        return make()
    finally:
        torch.set_default_device(None)


BY_DEFAULT = {"a context": _in_context, "a default device": _by_default}


@pytest.mark.parametrize("how", BY_DEFAULT)
@pytest.mark.parametrize("kind", MADE)
def test_torchs_default_device_is_honoured(kind, how):
    made = BY_DEFAULT[how](MADE[kind])
    assert made.device == META
    assert all(t.is_meta for t in [*made.parameters(), *made.buffers()])


def test_compressing_keeps_the_device_that_a_context_gave():
    with META:
        plain = EmbeddingBagCollection(tables=[tables(SUM)[1]])
    model = Model(plain)
    compress_model(model, tables=["p"], num_rows=2, num_chunks=1, verbose=False)
    made = model.collection
    assert isinstance(made, CCEEmbeddingBagCollection)
    assert made.device == META and all(t.is_meta for t in [*made.parameters(), *made.buffers()])


@pytest.mark.parametrize("kind", ["bags", "means with weights"])
def test_a_forward_pass_on_meta_has_the_shape(kind):
    on_cpu = MADE[kind]()
    kjt = batch(1, on_cpu.is_weighted())
    out = copy.deepcopy(on_cpu).to(META)(kjt.to(META))
    expected = on_cpu(kjt)
    assert out.values().is_meta and out.values().shape == expected.values().shape
    assert out.keys() == expected.keys()


@pytest.mark.parametrize("features", [[], None])
@pytest.mark.parametrize("kind", ["CCE", "plain", "sequences", "a plain sequence"])
def test_a_table_without_features_is_read_by_one_of_its_name(kind, features):
    shape = dict(name="x", num_embeddings=9, embedding_dim=8, feature_names=features)
    compressed = CCEEmbeddingBagConfig(num_rows=2, num_chunks=1, **shape)
    config, make = {
        "CCE": (compressed, CCEEmbeddingBagCollection),
        "plain": (EmbeddingBagConfig(**shape), CCEEmbeddingBagCollection),
        "sequences": (compressed, CCEEmbeddingCollection),
        "a plain sequence": (EmbeddingConfig(**shape), CCEEmbeddingCollection),
    }[kind]
    made = make([config])
    kjt = KeyedJaggedTensor(["x"], torch.tensor([3, 4]), lengths=torch.tensor([2]))
    assert set(made(kjt).keys()) == {"x"}
    assert config.feature_names == features  # the caller's stays as it was


def one_id_each():
    return KeyedJaggedTensor(["f", "g", "h"], torch.tensor([3, 4, 5]), lengths=torch.ones(3).int())


def test_modules_are_those_with_the_weights():
    made = CCEEmbeddingBagCollection(tables(SUM))
    names = [*(f"t#{j}" for j in range(4)), "p", "u#0", "u#1"]
    assert list(made.embedding_bags) == names and len(made.embedding_bags) == len(names)
    weights = {bag.weight.data_ptr() for bag in made.embedding_bags.values()}
    assert weights == {parameter.data_ptr() for parameter in made.parameters()}
    assert made.embedding_bags["p"].weight.shape == (40, 8)
    assert len(list(made.embedding_bags.parameters())) == len(names)


def test_a_module_that_is_put_in_is_looked_up():
    made = CCEEmbeddingBagCollection(tables(SUM))
    made.embedding_bags["p"] = torch.nn.EmbeddingBag.from_pretrained(
        torch.ones(40, 8), mode="sum", include_last_offset=True
    )
    assert torch.equal(made(one_id_each())["h@p"], torch.ones(1, 8))


def test_a_weight_that_is_put_in_is_looked_up():
    made = CCEEmbeddingBagCollection(tables(SUM))
    made.embedding_bags["p"].weight = torch.nn.Parameter(torch.ones(40, 8))
    assert torch.equal(made(one_id_each())["h@p"], torch.ones(1, 8))


def test_sequences_have_modules_too():
    made = CCEEmbeddingCollection(SequenceNet.configs())
    assert made.embeddings["p"].weight.shape == (300, 16)
    assert "t" in made.embeddings and "t#3" in made.embeddings and "x" not in made.embeddings


@pytest.mark.parametrize("modules", [lambda: MADE["bags"]().embedding_bags["t"],
                                     lambda: MADE["sequences"]().embeddings["t"]])  # fmt: skip
def test_a_compressed_table_has_no_weight_and_says_where_its_chunks_are(modules):
    with pytest.raises(AttributeError, match=r"table 't' is compressed.*'t#0', 't#1', 't#2'"):
        _ = modules().weight


@pytest.mark.parametrize("kind", MADE)
def test_a_compressed_table_has_its_parameters_and_a_plain_one_its_own(kind):
    made = MADE[kind]()
    bags = made.embeddings if kind == "sequences" else made.embedding_bags
    names = dict(made.named_parameters())
    own = {id(p) for p in bags["t"].parameters()}
    assert {name.split(".")[-2] for name, p in names.items() if id(p) in own} == {
        "t#0", "t#1", "t#2", "t#3"
    }  # fmt: skip
    assert len(bags["t"]) == 4 and bags["t"][1] is bags["t#1"]
    assert not hasattr(bags["t"], "weight") and hasattr(bags["p"], "weight")
    apply_optimizer_in_backward(torch.optim.SGD, bags["t"].parameters(), {"lr": 1.0})
    chosen = dict(in_backward_optimizer_filter(made.named_parameters(), include=True))
    assert {id(p) for p in chosen.values()} == own
    assert dict(made.named_parameters()).keys() == names.keys()


def hashed(**options):
    return CCEEmbeddingBagConfig(
        name="x", num_embeddings=90, embedding_dim=8, feature_names=["x"], num_rows=4,
        num_chunks=2, **options,
    )  # fmt: skip


def finalized():
    model = Model(CCEEmbeddingBagCollection(tables(SUM)))
    finalize(model)
    return model.collection


@pytest.mark.parametrize(
    "make",
    [
        *MADE.values(),
        finalized,
        lambda: CCEEmbeddingBagCollection([hashed(learned_codes=False)]),
        lambda: CCEEmbeddingBagCollection([hashed(track_seen=True, num_helper_rows=0)]),
        lambda: CCEEmbeddingBagCollection(tables(SUM), device="meta"),
    ],
)
def test_state_dict_keys_are_parameters_and_buffers(make):
    made = make()
    named = {**dict(made.named_parameters()), **dict(made.named_buffers())}
    state = made.state_dict()
    assert set(state) == set(named)
    for key, value in state.items():
        assert named[key].is_meta or torch.equal(value, named[key]), key


def test_a_batch_size_per_feature_on_meta_is_refused_as_it_is_elsewhere():
    made = CCEEmbeddingCollection(SequenceNet.configs(), device="meta")
    with pytest.raises(ValueError, match="one batch size for all features"):
        made(vbe_batch(1, False).to(META))
