"""Which tables of a sharded collection have the compiled backward, and that all of them train."""

from __future__ import annotations

import pytest
import torch
from torchrec import EmbeddingBagConfig, KeyedJaggedTensor

from cce_torchrec import CCEEmbeddingBagConfig
from cce_torchrec.lookup import native
from cce_torchrec.lookup.backward import CodebookBags
from cce_torchrec.torchrec_internals import fused_kernels, lookups_of
from tests.support.models import Model, collection, shard
from tests.support.ranks import run_ranks

FEATURES = ["small", "plain", "large", "wide"]
SMALL, BAGS = {"small", "plain"}, 64
"""Tables whose gradient takes less than 4 MiB."""


def tables():
    return [
        CCEEmbeddingBagConfig(
            name="small", num_embeddings=900, embedding_dim=16, feature_names=["small"], num_rows=20
        ),
        EmbeddingBagConfig(
            name="large", num_embeddings=70_000, embedding_dim=16, feature_names=["large"]
        ),
        EmbeddingBagConfig(
            name="plain", num_embeddings=90, embedding_dim=8, feature_names=["plain"]
        ),
        CCEEmbeddingBagConfig(
            name="wide", num_embeddings=900, embedding_dim=64, feature_names=["wide"],
            num_rows=5_000, num_helper_rows=30_000, num_chunks=2,
        ),
    ]  # fmt: skip


def batch(seed):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 4, (len(FEATURES) * BAGS,), generator=g)
    ids = torch.randint(90, (int(lengths.sum()),), generator=g)
    return KeyedJaggedTensor(FEATURES, ids, lengths=lengths)


def trained(rank, world_size):
    """Trains as the unsharded module does; returns the names of tables by class of their kernel."""
    plain = collection(tables())
    model = shard(Model(collection(tables())), tables(), "cw")
    model.load_state_dict(
        {f"collection.{name}": value for name, value in plain.state_dict().items()}
    )
    for seed in range(3):
        batches = [batch(seed * 10 + r) for r in range(world_size)]
        out = model(batches[rank]).wait().values()
        expected = [plain(b).values() for b in batches]
        torch.testing.assert_close(out, expected[rank], rtol=1e-5, atol=1e-5)
        out.square().sum().backward()
        torch.stack([e.square().sum() for e in expected]).mean().backward()
    names: dict[type, set[str]] = {}
    for group, kernel in fused_kernels(lookups_of(model.module.collection)):
        names.setdefault(type(kernel), set()).update(t.name.split("#")[0] for t in group)
    return names


@pytest.mark.skipif(not native.available(), reason="built without a C++ compiler")
def test_large_tables_do_not_keep_small_ones_from_it():
    by_rank = run_ranks(2, trained)
    ours = set().union(*(names.pop(CodebookBags, set()) for names in by_rank))
    theirs = set().union(*(tables for names in by_rank for tables in names.values()))
    assert (ours, theirs) == (SMALL, set(FEATURES) - SMALL)
