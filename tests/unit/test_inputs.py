"""Inputs of the unsharded modules: batch size per feature, int32, raw ids, weights, sequences."""

import pytest
import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from torchrec import KeyedJaggedTensor
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.modules.mc_embedding_modules import (
    ManagedCollisionEmbeddingBagCollection,
    ManagedCollisionEmbeddingCollection,
)
from torchrec.modules.mc_modules import (
    DistanceLFU_EvictionPolicy,
    ManagedCollisionCollection,
    MCHManagedCollisionModule,
)

from cce_torchrec import CCEEmbeddingBagCollection, CCEEmbeddingBagConfig, CCEEmbeddingCollection
from cce_torchrec.clustering import cluster
from cce_torchrec.clustering.local_chunks import unsharded_rows
from cce_torchrec.codes.hashing import hash_ids, raw_id_key
from tests.support.models import MEAN, SUM, batch, every_example, tables, vbe_batch
from tests.unit.test_collection import embedding


@pytest.mark.parametrize("pooling", [SUM, MEAN])
@pytest.mark.parametrize("weighted", [False, True])
def test_batch_size_per_feature(pooling, weighted):
    module = CCEEmbeddingBagCollection(tables(pooling), is_weighted=weighted)
    kjt = vbe_batch(0, weighted)
    assert torch.equal(module(kjt).values(), module(every_example(kjt)).values())


def test_batch_size_per_feature_needs_inverse_indices():
    kjt = vbe_batch(0, False)
    bare = KeyedJaggedTensor(
        keys=kjt.keys(), values=kjt.values(), lengths=kjt.lengths(),
        stride_per_key_per_rank=kjt.stride_per_key_per_rank(),
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"no inverse_indices for \['f', 'g', 'h'\]"):
        CCEEmbeddingBagCollection(tables(SUM))(bare)


def test_int32_ids():
    module = CCEEmbeddingBagCollection(tables(SUM))
    kjt = batch(0, False)
    narrow = KeyedJaggedTensor(
        keys=kjt.keys(), values=kjt.values().int(), lengths=kjt.lengths().int(), stride=kjt.stride()
    )
    assert torch.equal(module(kjt).values(), module(narrow).values())


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_raw_ids(dtype):
    shape = dict(name="t", num_embeddings=50, embedding_dim=8, feature_names=["f"], num_rows=6)
    shape |= dict(num_chunks=2, seed=3)
    raw = CCEEmbeddingBagCollection([CCEEmbeddingBagConfig(hash_ids=True, **shape)])
    plain = CCEEmbeddingBagCollection([CCEEmbeddingBagConfig(**shape)])
    plain.load_state_dict(raw.state_dict())
    ids = torch.tensor([-1, 0, 49, 50, -(2**31), 2**31 - 1], dtype=dtype)
    make = lambda values: KeyedJaggedTensor(  # noqa: E731
        keys=["f"], values=values, lengths=torch.ones(len(ids), dtype=torch.long)
    )
    expected = plain(make(hash_ids(ids, raw_id_key(3, "t"), 50))).values()
    assert torch.equal(raw(make(ids)).values(), expected)
    assert raw.num_invalid_ids == 0


def test_gradients_of_weights():
    """Sum over the bag of w * x: the gradient to w is x times that of the output."""
    module = CCEEmbeddingBagCollection(tables(SUM), is_weighted=True)
    kjt = batch(0, True)
    weights = kjt.weights().requires_grad_()
    module(kjt)["g"].sum().backward()
    config = module.embedding_bag_configs()[0]
    jagged = kjt.to_dict()
    ids = jagged["g"].values()
    expected = torch.stack([embedding(module, config, int(id_)).sum() for id_ in ids])
    own = dict(zip(kjt.keys(), weights.grad.split(kjt.length_per_key()), strict=True))
    torch.testing.assert_close(own["g"], expected)
    assert not own["f"].any() and not own["unused"].any()


def test_sequences():
    shape = dict(embedding_dim=8, num_embeddings=40)
    module = CCEEmbeddingCollection(
        [
            CCEEmbeddingBagConfig(
                name="t", feature_names=["f", "g"], num_rows=5, num_chunks=2, **shape
            ),
            EmbeddingConfig(name="p", feature_names=["f"], **shape),
        ]
    )
    kjt = batch(0, True)
    out = module(kjt)
    assert list(out) == ["f@t", "g", "f@p"]
    assert module.embedding_names_by_table() == [["f@t", "g"], ["f@p"]]
    for name, config in zip(
        out, [*[module.bags.embedding_bag_configs()[0]] * 2, None], strict=True
    ):
        config = config or module.bags.embedding_bag_configs()[1]
        own = kjt[name.split("@")[0]]
        expected = torch.stack([embedding(module.bags, config, int(i)) for i in own.values()])
        torch.testing.assert_close(out[name].values(), expected)
        assert torch.equal(out[name].lengths(), own.lengths())
    assert [c.table for c in cluster(module).chunks] == ["t"] * 2


@pytest.mark.parametrize("bad", [-1, 40, 2**40])
def test_sequences_with_ids_out_of_bounds(bad):
    config = CCEEmbeddingBagConfig(
        name="t", num_embeddings=40, embedding_dim=8, feature_names=["f"], num_rows=5, num_chunks=2
    )
    make = lambda ids: KeyedJaggedTensor(  # noqa: E731
        keys=["f"], values=torch.tensor(ids), lengths=torch.tensor([1, 2])
    )
    module = CCEEmbeddingCollection([config])
    ids = make([3, bad, 7])
    assert torch.equal(module(ids)["f"].values(), module(make([3, 0, 7]))["f"].values())
    assert module.num_invalid_ids == 1 and ids.values()[1] == bad
    fatal = CCEEmbeddingCollection([config], bounds_check_mode=BoundsCheckMode.FATAL)
    with pytest.raises(ValueError, match=rf"table 't', feature 'f': .*{bad}"):
        fatal(ids)
    with pytest.raises(ValueError, match=r"lacks features 'f' \(table 't'\)"):
        module(KeyedJaggedTensor(["g"], torch.tensor([1]), lengths=torch.tensor([1])))


def test_sequences_refuse():
    shape = dict(num_embeddings=40, feature_names=["f"], num_rows=5, num_chunks=1)
    table = CCEEmbeddingBagConfig(name="t", embedding_dim=8, **shape)
    other = CCEEmbeddingBagConfig(name="u", embedding_dim=16, **shape)
    with pytest.raises(ValueError, match=r"share one embedding_dim; got {'t': 8, 'u': 16}"):
        CCEEmbeddingCollection([table, other])
    mean = CCEEmbeddingBagConfig(name="t", embedding_dim=8, pooling=MEAN, **shape)
    with pytest.raises(ValueError, match=r"table 't': pooling .* has no meaning"):
        CCEEmbeddingCollection([mean])


@pytest.mark.parametrize("cls", [torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad])
def test_dense_optimizer_state_follows(cls):
    """First moments zero; main the mean of its members, the helper its mean or a tenth of it."""
    module = CCEEmbeddingBagCollection(tables(SUM))
    optimizer = cls(module.parameters(), lr=0.01)
    for seed in range(3):
        optimizer.zero_grad()
        module(batch(seed, False)).values().square().sum().backward()
        optimizer.step()
    before = {
        name: {k: v.clone() for k, v in state.items()}
        for name, (_, state) in unsharded_rows(module, optimizer).items()
    }
    cluster(module, optimizer=optimizer)
    for name, (_, state) in unsharded_rows(module, optimizer).items():
        if "#" not in name:
            continue
        k = 5 if name.startswith("t") else 300
        second = "sum" if cls is torch.optim.Adagrad else "exp_avg_sq"
        old, new = before[name][second], state[second]
        assert new[:k].min() >= 0 and new[:k].max() <= old[:k].max()
        if cls is torch.optim.Adagrad:
            torch.testing.assert_close(new[k:], 0.1 * old[k:].mean(0).expand_as(new[k:]))
        else:
            assert not state["exp_avg"].any() and before[name]["exp_avg"].any()
            torch.testing.assert_close(new[k:], old[k:].mean(0).expand_as(new[k:]))
        assert torch.equal(state["step"], before[name]["step"])


@pytest.mark.parametrize(
    ("collection", "around"),
    [
        (CCEEmbeddingBagCollection, ManagedCollisionEmbeddingBagCollection),
        (CCEEmbeddingCollection, ManagedCollisionEmbeddingCollection),
    ],
)
def test_managed_collision_is_refused(collection, around):
    config = CCEEmbeddingBagConfig(
        name="t", num_embeddings=40, embedding_dim=8, feature_names=["f"], num_rows=5, num_chunks=2
    )
    managed = MCHManagedCollisionModule(
        zch_size=40, device=torch.device("cpu"), input_hash_size=1000, eviction_interval=1,
        eviction_policy=DistanceLFU_EvictionPolicy(),
    )  # fmt: skip
    managed = ManagedCollisionCollection({"t": managed}, [config])
    with pytest.raises(ValueError, match=r"tables \['t'\]: managed collision rewrites the rows"):
        around(collection([config]), managed)
