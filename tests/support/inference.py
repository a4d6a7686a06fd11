"""Collections of every kind of table, with batches for them."""

import torch
from torchrec import EmbeddingBagConfig, KeyedJaggedTensor, PoolingType

from cce_torchrec import CCEEmbeddingBagCollection, CCEEmbeddingBagConfig, cluster, finalize

LIMITS = {"f": 1000, "g": 50, "h": 333, "raw": 1 << 40, "q": 333, "x": 40, "y": 60}
"""Ids of each feature; those of "raw" are hashed."""


def one_table(num_rows=20, **kwargs):
    """A collection of a single CCE table, as most tests need no more."""
    fields = {"num_embeddings": 1000, "embedding_dim": 16, "feature_names": ["f"], **kwargs}
    return CCEEmbeddingBagCollection([CCEEmbeddingBagConfig(name="a", num_rows=num_rows, **fields)])


def many_tables(is_weighted=False):
    """Shared features, MEAN, plain tables, CE, raw ids, one main row, a joint table."""
    table = CCEEmbeddingBagConfig
    mean = PoolingType.MEAN
    tables = [
        table(name="a", num_embeddings=1000, embedding_dim=16, num_rows=20,
              feature_names=["f", "g"]),
        EmbeddingBagConfig(name="plain", num_embeddings=50, embedding_dim=12,
                           feature_names=["g"], pooling=mean),
        table(name="wide", num_embeddings=333, embedding_dim=32, num_chunks=8, num_rows=300,
              feature_names=["h"], pooling=mean),
        table(name="ce", num_embeddings=333, embedding_dim=16, num_rows=30, num_helper_rows=0,
              learned_codes=False, feature_names=["h"]),
        table(name="raw", num_embeddings=333, embedding_dim=16, num_chunks=2, num_rows=5,
              hash_ids=True, feature_names=["raw"]),
        table(name="restarted", num_embeddings=333, embedding_dim=8, num_chunks=1, num_rows=1,
              num_helper_rows=30, feature_names=["q"]),
        table(name="joint", num_embeddings=100, embedding_dim=16, num_rows=16,
              feature_names=["x", "y"], id_ranges={"x": range(0, 40), "y": range(40, 100)},
              rotate_chunks=True),
    ]  # fmt: skip
    return CCEEmbeddingBagCollection(tables, is_weighted=is_weighted)


def trained(is_weighted, stage):
    """`many_tables` not yet clustered, clustered, and (those that can be) finalized."""
    torch.manual_seed(0)
    collection = many_tables(is_weighted)
    if stage != "fresh":
        cluster(collection)
    if stage == "finalized":
        finalize(collection, tables=["a", "wide"])
    return collection


def batch_of(collection, num_bags, seed=0, dtype=torch.int64):
    """Bags of 0 to 3 ids of every feature of `collection`."""
    random = torch.Generator().manual_seed(seed)
    names = list(dict.fromkeys(slot.feature for slot in collection.output.slots))
    lengths = torch.randint(0, 4, (len(names), num_bags), generator=random)
    most = 2**31 if dtype == torch.int32 else 2**62
    ids = [
        torch.randint(0, min(LIMITS[name], most), (int(own.sum()),), generator=random)
        for name, own in zip(names, lengths, strict=True)
    ]
    values = torch.cat(ids).to(dtype)
    weights = torch.rand(len(values), generator=random) if collection.is_weighted() else None
    return KeyedJaggedTensor(names, values, weights, lengths=lengths.flatten())


def tensors(batch):
    """What a lookup is called with."""
    return batch.values(), batch.lengths(), batch.weights_or_none()
