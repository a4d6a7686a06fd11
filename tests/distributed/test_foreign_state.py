"""`load_state_dict` of what another model has saved: refused, or told of, before it is written."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from cce_torchrec import CCEEmbeddingBagCollection, CCEEmbeddingBagConfig, CCEEmbeddingCollection
from tests.support.jobs import build
from tests.support.models import Model, Net
from tests.support.ranks import on_ranks

COUNTRY = EmbeddingBagConfig(
    name="country", num_embeddings=50, embedding_dim=16, feature_names=["country"]
)


USER = CCEEmbeddingBagConfig(name="user", num_embeddings=500, embedding_dim=16, num_rows=16)


def model(**changed):
    return Model(CCEEmbeddingBagCollection([replace(USER, **changed), COUNTRY]))


def saved(**changed):
    return model(**changed).state_dict()


def copied(state):
    return {name: value.clone() for name, value in state.items()}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"num_rows": 32}, r"\[80, 4\] in 'collection.*user#0.weight', the model \[64, 4\] .*=16"),
        ({"num_chunks": 2}, r"\[64, 8\] in .*user#0.weight', the model \[64, 4\] .*num_chunks=4"),
        ({"num_embeddings": 400}, r"\[200, 4\] in .*user.codes', the model \[250, 4\]"),
        ({"num_embeddings": 600}, r"\[300, 4\] in .*user.codes', the model \[250, 4\]"),
    ],
)
def test_another_configuration(changed, says, strict):
    """Whatever `strict` is, as in torch; here nothing of the collection is written."""
    fresh = model()
    before = copied(fresh.state_dict())
    with pytest.raises(ValueError, match=f"table 'user': the checkpoint has {says}"):
        fresh.load_state_dict(saved(**changed), strict=strict)
    assert all(torch.equal(value, before[name]) for name, value in fresh.state_dict().items())


def test_codes_for_a_table_without():
    fresh = model(learned_codes=False)
    with pytest.raises(ValueError, match=r"'user': the checkpoint has codes, the model has no"):
        fresh.load_state_dict(saved(), strict=False)


@pytest.mark.parametrize(
    ("made", "config", "ours"),
    [
        (EmbeddingBagCollection, EmbeddingBagConfig, CCEEmbeddingBagCollection),
        (EmbeddingCollection, EmbeddingConfig, CCEEmbeddingCollection),
    ],
)
def test_the_full_weight(caplog, made, config, ours):
    """Of a table that was compressed since: the rest is loaded, and the log says what was not."""
    tables = [
        config(name=name, num_embeddings=ids, embedding_dim=16, feature_names=[name])
        for name, ids in (("user", 500), ("country", 50))
    ]
    plain = Model(made(tables=tables))
    compressed = Model(ours([USER, tables[1]]))
    state = plain.state_dict()
    with caplog.at_level(logging.WARNING):
        compressed.load_state_dict(state, strict=False)
    assert "table 'user': the state dict has its full weight ('collection.embedding" in caplog.text
    (found,) = [value for name, value in compressed.state_dict().items() if ".country." in name]
    (old,) = [value for name, value in state.items() if ".country." in name]
    assert torch.equal(found, old)
    with pytest.raises(RuntimeError, match=r'Unexpected key.*user\.weight"'):
        compressed.load_state_dict(state)


@pytest.mark.parametrize(
    ("kept", "has", "lacks"),
    [
        ("codes", "user.codes", "user#0.weight"),
        ("embedding_bags", "user#0.weight", "user.codes"),
        ("user#1", "user#1.weight", "user#0.weight"),
    ],
)
def test_half_of_a_table(caplog, kept, has, lacks):
    half = {name: value for name, value in saved().items() if kept in name}
    with caplog.at_level(logging.WARNING):
        model().load_state_dict(half, strict=False)
    assert f"{has}' and not 'collection." in caplog.text
    assert f"{lacks}'; codes belong to the codebooks" in caplog.text


def test_its_own_state_says_nothing(caplog):
    with caplog.at_level(logging.WARNING):
        model().load_state_dict(saved())
    assert "the state dict has" not in caplog.text


@pytest.mark.parametrize("made", ["bags", "sequences", "a module around"])
def test_codes_without_the_number_of_clusterings(caplog, made):
    """Which their helper rows follow from; a table without a helper needs none."""

    def fresh():
        tables = [USER]
        return {
            "bags": lambda: CCEEmbeddingBagCollection(tables),
            "sequences": lambda: CCEEmbeddingCollection(tables),
            "a module around": lambda: Model(Model(CCEEmbeddingBagCollection(tables))),
        }[made]()

    state = {k: v for k, v in fresh().state_dict().items() if k.endswith(("weight", "codes"))}
    with caplog.at_level(logging.WARNING):
        fresh().load_state_dict(state, strict=False)
    (line,) = [one for one in caplog.messages if "and not" in one]
    assert "table 'user'" in line and "user.codes' and not '" in line
    assert "user.clusterings'; ids find helper rows by that number" in line


def test_a_table_without_a_helper_needs_no_number_of_clusterings(caplog):
    state = {k: v for k, v in saved(num_helper_rows=0).items() if not k.endswith("clusterings")}
    with caplog.at_level(logging.WARNING):
        model(num_helper_rows=0).load_state_dict(state, strict=False)
    assert "and not" not in caplog.text


@pytest.mark.parametrize("name", ["num_helper_rows", "clusterings"])
@pytest.mark.parametrize(
    ("value", "says"),
    [(torch.tensor([1, 2]), r"\[2\]"), (torch.ones(0), r"\[0\]"), (48, "48"), (None, "None")],
    ids=str,
)
def test_what_is_no_one_number(name, value, says):
    fresh = model()
    before, state = copied(fresh.state_dict()), saved()
    state = {k: value if k.endswith(name) else v for k, v in state.items()}
    with pytest.raises(
        ValueError, match=f"'user': the checkpoint has {says} in '.*{name}', the mo"
    ):
        fresh.load_state_dict(state, strict=False)
    assert all(torch.equal(value, before[name]) for name, value in fresh.state_dict().items())


@on_ranks(2)
@pytest.mark.parametrize("kind", ["tw", "cw", "rw"])
def test_shards_into_an_unsharded_collection(rank, world_size, kind):
    source, _ = build(kind, 5)
    target, _ = build("unsharded", 0)
    before = copied(target.state_dict())
    with pytest.raises(
        ValueError, match=r"table '[tpu]': .*shards of \[.* load that by load_check"
    ):
        target.load_state_dict(source.state_dict())
    kept = {k: v for k, v in target.state_dict().items() if "collection" in k}
    assert all(torch.equal(value, before[name]) for name, value in kept.items())


@on_ranks(2)
@pytest.mark.parametrize("placement", [Shard(0), Replicate()], ids=str)
@pytest.mark.parametrize("kind", ["unsharded", "tw", "cw", "rw", "dp"])
def test_dtensors(rank, world_size, kind, placement):
    """Of codes, codebooks and plain tables: on every rank, and nothing of them is written."""
    mesh = init_device_mesh("cpu", (world_size,))
    source, _ = build("unsharded", 5)
    target, _ = build(kind, 0)
    before = [(name, p.detach().clone()) for name, p in target.named_parameters()]
    codes = copied({k: v for k, v in target.named_buffers() if "codes" in k})
    for inside, table in ((".t.codes", "t"), ("u#1.weight", "u"), (".p.weight", "p")):
        state = {
            name: distribute_tensor(value, mesh, [placement]) if inside in name else value
            for name, value in source.state_dict().items()
        }
        with pytest.raises(ValueError, match=rf"table '{table}': .*DTensor .*\.full_tensor\(\)"):
            target.load_state_dict(state, strict=False)
    for (name, old), (_, new) in zip(before, target.named_parameters(), strict=True):
        assert "collection" not in name or torch.equal(old, new), name
    assert all(torch.equal(codes[k], v) for k, v in target.named_buffers() if k in codes)


@on_ranks(2)
@pytest.mark.parametrize("kind", ["tw", "cw", "rw"])
@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"num_rows": 7, "num_helper_rows": 15}, r"'t': the checkpoint has \[22, 4\] in '.*t#0.w"),
        (
            {"num_embeddings": 250},
            r"'t': the checkpoint has \[32, 12\] in .*codes', the model \[3",
        ),
        ({"num_chunks": 2}, r"'t': the checkpoint has \[20, 8\] in '.*t#0.weight', the model \[20"),
    ],
)
def test_sharded(rank, world_size, kind, changed, says):
    """On every rank, also where no chunk of the table is."""
    sharded, _ = build(kind, 0)
    first, *others = Net.configs()
    other, _ = build(kind, 1, configs=[replace(first, **changed), *others])
    before = [(name, p.detach().clone()) for name, p in sharded.named_parameters()]
    with pytest.raises(ValueError, match=says):
        sharded.load_state_dict(other.state_dict())
    for (name, old), (_, new) in zip(before, sharded.named_parameters(), strict=True):
        if "collection" in name:
            assert torch.equal(old, new), name
