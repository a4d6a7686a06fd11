"""A collection on the CPU and its equal on the emulated device, and batches for both."""

from __future__ import annotations

from typing import Any

import torch
from torchrec import EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.modules.embedding_configs import PoolingType

from cce_torchrec import CCEEmbeddingBagCollection, CCEEmbeddingBagConfig
from tests.desk.emulated import on_cpu

N = 3000
BATCH = 16
OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "hash_ids": {"hash_ids": True},
    "track_seen": {"track_seen": True},
    "hash_ids and track_seen": {"hash_ids": True, "track_seen": True},
    "learned_codes=False": {"learned_codes": False},
    "finalized": {"num_helper_rows": 0},
    "one chunk": {"num_chunks": 1},
    "two chunks": {"num_chunks": 2},
    "wide codes": {"num_rows": 300},
    "rare": {"recipe": "rare", "num_rows": 1, "hash_ids": True},
}


def table(index: int, **settings: Any) -> CCEEmbeddingBagConfig:
    return CCEEmbeddingBagConfig(
        name=f"t{index}",
        feature_names=[f"f{index}"],
        **{"num_embeddings": N, "embedding_dim": 16, "num_rows": 20 + index, **settings},
    )


def two_tables(**settings: Any) -> list[EmbeddingBagConfig]:
    """A table that is summed and one of which the mean is taken."""
    return [table(0, **settings), table(1, pooling=PoolingType.MEAN, **settings)]


def joint_tables(**settings: Any) -> list[EmbeddingBagConfig]:
    """A table of two features with ids of their own, and one whose features share its ids."""
    shape = {"num_rows": 20, **settings, "num_embeddings": 2 * N, "embedding_dim": 16}
    ranges = {"f1": range(N), "f0": range(N + 5, 2 * N)}
    return [
        CCEEmbeddingBagConfig(
            name="joint", feature_names=["f1", "f0"], id_ranges=ranges, pooling=PoolingType.MEAN,
            rotate_chunks=True, **shape,
        ),
        CCEEmbeddingBagConfig(name="shared", feature_names=["f0", "f1"], **shape),
    ]  # fmt: skip


def mixed_tables(count: int = 26) -> list[EmbeddingBagConfig]:
    """Tables of every option, and plain ones, in turn."""
    kinds = [*OPTIONS.values(), None]
    return [
        plain(i) if settings is None else table(i, **settings)
        for i, settings in zip(range(count), kinds * count, strict=False)
    ]


def plain(index: int) -> EmbeddingBagConfig:
    return EmbeddingBagConfig(
        name=f"t{index}", num_embeddings=N, embedding_dim=16, feature_names=[f"f{index}"]
    )


def batch(
    count: int = 2,
    bad: int | None = None,
    weighted: bool = False,
    dtype: torch.dtype = torch.int64,
    seed: int = 0,
    beyond: int = 0,
    num_ids: int = N,
) -> KeyedJaggedTensor:
    """Up to 5 ids in each bag of features f0, f1, ...; every fifth id is `bad`.

    `beyond` values follow the last bag, as in tensors of one size for CUDA graphs.
    """
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 6, (count * BATCH,), generator=g)
    ids = torch.randint(num_ids, (int(lengths.sum()) + beyond,), generator=g)
    if bad is not None:
        ids[::5] = bad
    return KeyedJaggedTensor(
        [f"f{i}" for i in range(count)],
        ids.to(dtype),
        torch.rand(len(ids), generator=g) if weighted else None,
        lengths=lengths,
        stride=BATCH,
    )


def twins(
    tables: list[EmbeddingBagConfig], **settings: Any
) -> tuple[CCEEmbeddingBagCollection, CCEEmbeddingBagCollection]:
    """Equal collections, the first on the CPU and the second on the device."""
    cpu = CCEEmbeddingBagCollection(tables, **settings)
    cuda = CCEEmbeddingBagCollection(tables, device="cuda", **settings)
    cuda.load_state_dict(cpu.state_dict())
    return cpu, cuda


def assert_same_state(expected: torch.nn.Module, cuda: torch.nn.Module, **tolerance: float) -> None:
    """Parameters (within `tolerance`), and buffers, bit by bit."""
    for (name, one), other in zip(expected.named_parameters(), cuda.parameters(), strict=True):
        assert other.is_cuda, name
        torch.testing.assert_close(on_cpu(other), on_cpu(one), msg=name, **tolerance)
    for (name, one), other in zip(expected.named_buffers(), cuda.buffers(), strict=True):
        assert other.is_cuda, name
        if name.endswith("seen"):  # the last byte belongs to no id
            one, other = one[:-1], other[:-1]
        assert torch.equal(on_cpu(other), on_cpu(one)), name
