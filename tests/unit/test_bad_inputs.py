"""Batches that do not fit together are refused by name; odd ones that do are looked up right."""

import pytest
import torch
from tensordict import TensorDict
from torchrec import JaggedTensor, KeyedJaggedTensor
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from cce_torchrec import CCEEmbeddingBagCollection, CCEEmbeddingCollection
from cce_torchrec.lookup import expansion, native
from tests.support.bad_inputs import (
    BAD,
    TOTAL,
    VARIABLE,
    WEIGHTED,
    lengths_with,
    made,
    tensor_dict,
)
from tests.support.models import KEYS, STRIDE, SUM, SequenceNet, batch, tables, vbe_batch


@pytest.fixture(params=["compiled", "torch"])
def form(request, monkeypatch):
    """Both expansions of a CPU."""
    if request.param == "torch":
        monkeypatch.setattr(native, "takes", lambda ids: False)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("fault", BAD | VARIABLE)
def test_refused(fault):
    make, says = (BAD | VARIABLE)[fault]
    module = CCEEmbeddingBagCollection(tables(SUM))
    module(batch(0, False))
    with pytest.raises(ValueError, match=says):
        module(make())


@pytest.mark.parametrize("fault", BAD)
def test_refused_in_sequences(fault):
    make, says = BAD[fault]
    with pytest.raises(ValueError, match=says):
        CCEEmbeddingCollection(SequenceNet.configs())(make())


@pytest.mark.parametrize("fault", WEIGHTED)
def test_weights_refused(fault):
    make, says = WEIGHTED[fault]
    with pytest.raises(ValueError, match=says):
        CCEEmbeddingBagCollection(tables(SUM), is_weighted=True)(make())
    # Nobody reads them where nothing is pooled by weights.
    module = CCEEmbeddingBagCollection(tables(SUM))
    assert torch.equal(module(make()).values(), module(batch(0, False)).values())


def narrow(dtype):
    lengths = batch(0, False).lengths()
    return made(values=torch.arange(TOTAL).remainder(2).to(dtype), lengths=lengths), made(
        values=torch.arange(TOTAL).remainder(2), lengths=lengths
    )


def strided(values):
    """`values` at every other place."""
    return values.repeat_interleave(2)[::2]


ALLOWED = {
    **{f"ids of {t}": lambda t=t: narrow(t) for t in (torch.int16, torch.uint8, torch.int8)},
    "ids of bool": lambda: narrow(torch.bool),
    "values beyond the last bag": lambda: (
        made(values=torch.cat([batch(0, False).values(), torch.tensor([7, -1])])),
        batch(0, False),
    ),
    "strided values and lengths": lambda: (
        made(values=strided(batch(0, False).values()), lengths=strided(lengths_with())),
        batch(0, False),
    ),
    "lengths in two dimensions": lambda: (
        made(lengths=lengths_with().view(4, STRIDE)), batch(0, False)
    ),
    "right length_per_key and offset_per_key": lambda: (
        made(
            length_per_key=batch(0, False).length_per_key(),
            offset_per_key=batch(0, False).offset_per_key(),
        ),
        batch(0, False),
    ),
    "a stale jt_dict": lambda: (made(jt_dict=batch(5, False).to_dict()), batch(0, False)),
    "wrong lengths_offset_per_key": lambda: (
        made(lengths_offset_per_key=[0, 1, 2, 3, 4]), batch(0, False)
    ),
}  # fmt: skip


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("case", ALLOWED)
def test_looked_up_right(case):
    odd, usual = ALLOWED[case]()
    module = CCEEmbeddingBagCollection(tables(SUM))
    assert torch.equal(module(odd).values(), module(usual).values())
    sequences = CCEEmbeddingCollection(SequenceNet.configs())
    expected = sequences(usual)
    for name, jagged in sequences(odd).items():
        assert torch.equal(jagged.values(), expected[name].values())
        assert torch.equal(jagged.lengths(), expected[name].lengths())


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize(
    ("dtype", "ids"), [(torch.int8, 100), (torch.uint8, 200), (torch.int16, 20_000)], ids=str
)
def test_rows_of_a_bag_are_counted_in_no_short_type(dtype, ids):
    """A bag has twice as many rows as ids, which the type of its lengths cannot count."""
    module = CCEEmbeddingBagCollection([tables(SUM)[0]])
    short, usual = (
        KeyedJaggedTensor(
            ["f", "g"], torch.arange(ids + 3) % 40, lengths=torch.tensor([ids, 0, 3, 0]).to(t)
        )
        for t in (dtype, torch.int64)
    )
    assert torch.equal(module(short).values(), module(usual).values())


def test_rows_beyond_int32_are_counted_in_int64(monkeypatch):
    monkeypatch.setattr(expansion, "MOST", 10)  # in place of 2^31 rows
    module = CCEEmbeddingBagCollection(tables(SUM))
    kjt = made(lengths=lengths_with().int())
    slots = [slot.feature for slot in module.output.slots]
    by_slot = kjt.permute([KEYS.index(name) for name in slots])
    assert module.expansion(by_slot, module.bounds_check).lengths().dtype == torch.int64
    assert torch.equal(module(kjt).values(), module(batch(0, False)).values())


def test_a_tensor_dict_is_taken_as_torchrec_takes_it():
    kjt = batch(0, False)
    features = tensor_dict(kjt)
    configs = tables(SUM)
    plain = EmbeddingBagCollection(tables=configs[1:2])
    ours = CCEEmbeddingBagCollection(configs[1:2])
    weight = plain.embedding_bags["p"].weight.detach()
    next(ours.parameters()).data.copy_(weight)
    assert torch.equal(ours(features).values(), plain(features).values())
    module, sequences = (
        CCEEmbeddingBagCollection(configs),
        CCEEmbeddingCollection(SequenceNet.configs()),
    )
    assert torch.equal(module(features).values(), module(kjt).values())
    assert torch.equal(sequences(features)["g"].values(), sequences(kjt)["g"].values())
    del features["f"]
    with pytest.raises(ValueError, match=r"lacks features 'f' \(table 't'\), 'f' \(table 'p'\)"):
        module(features)


def jagged(values, lengths, **weights):
    return JaggedTensor(torch.tensor(values), lengths=torch.tensor(lengths), **weights)


BAD_DICTS = {
    "ids of the next feature": (
        jagged([1, 2, 3], [1, 1]), r"length_per_key \[3, 1, 2\] .* \[2, 2, 2\]"
    ),
    "too few ids": (jagged([1], [1, 1]), "Sum of lengths must equal"),
    "a plain tensor": (
        torch.tensor([1, 2]), r"feature 'f' \(table 't', 'p'\) of the TensorDict is <class 'torch.T"
    ),
    "text": ("1 2", r"feature 'f' \(table 't', 'p'\) of the TensorDict is <class 'str'>"),
    "float ids": (jagged([1.5, 2.5], [1, 1]), "are torch.float32"),
}  # fmt: skip
"""Of feature f; the others have two ids in two bags."""


@pytest.mark.parametrize("fault", BAD_DICTS)
def test_tensor_dicts_refused(fault):
    """Plain TorchRec reads the next feature's ids where they fit together in all."""
    own, says = BAD_DICTS[fault]
    features = {"f": own, "g": jagged([1, 2], [1, 1]), "h": jagged([3, 4], [1, 1])}
    if fault == "ids of the next feature":
        features["g"] = jagged([1], [1, 1])
    for module in (
        CCEEmbeddingBagCollection(tables(SUM)), CCEEmbeddingCollection(SequenceNet.configs())
    ):  # fmt: skip
        with pytest.raises(ValueError, match=says):
            module(TensorDict(features))


def test_weights_of_tensor_dicts_are_refused():
    features = {key: jagged([1, 2], [1, 1], weights=torch.ones(2)) for key in "fgh"}
    module = CCEEmbeddingBagCollection(tables(SUM), is_weighted=True)
    with pytest.raises(ValueError, match=r"'f' \(table 't', 'p'\).* no weights from a TensorDict"):
        module(TensorDict(features))


def test_other_inputs_are_refused_by_name():
    for wrong in ({"f": torch.zeros(1)}, torch.zeros(3), None):
        with pytest.raises(ValueError, match=r"'f' \(table 't', 'p'\).*; got <class"):
            CCEEmbeddingBagCollection(tables(SUM))(wrong)


def test_an_expansion_leaves_no_row_unwritten():
    """Ids that arrive from another rank are fewer than the lengths beside them say."""
    module = CCEEmbeddingBagCollection([tables(SUM)[0]])
    short = KeyedJaggedTensor(
        ["f", "g"], torch.arange(3), lengths=torch.tensor([2, 2]), length_per_key=[2, 2]
    )
    with pytest.raises(ValueError, match="table 't', feature 'f', feature 'g': 3 ids arrived"):
        module.expansion(short, module.bounds_check)


def test_a_batch_is_the_callers():
    """Nothing is cached in it, or written to it, that was not there."""
    for make in (batch, vbe_batch):
        kjt = make(0, False)
        kept = kjt.values().clone(), kjt.lengths().clone()
        CCEEmbeddingBagCollection(tables(SUM))(kjt)
        assert torch.equal(kjt.values(), kept[0]) and torch.equal(kjt.lengths(), kept[1])
