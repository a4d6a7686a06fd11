"""`compute-sanitizer python -m tests.gpu.kernels_once`: every Triton kernel once, on small inputs.

With PYTORCH_NO_CUDA_MEMORY_CACHING=1 every tensor is an allocation of its own, so that a kernel
that reads or writes beyond one is found. Results are compared with the CPU's elsewhere
(tests/gpu/test_*_cuda.py); here it is enough that nothing is wrong with memory.
"""

import contextlib
import itertools

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from torchrec import KeyedJaggedTensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from cce_torchrec import CCEEmbeddingBagCollection, CCEEmbeddingBagConfig
from cce_torchrec.clustering import cluster, finalize
from cce_torchrec.kmeans import kmeans

DEVICE, BATCH = torch.device("cuda", 0), 37
OPTIONS = [{}, {"hash_ids": True}, {"track_seen": True}, {"learned_codes": False}]


def tables(num_ids):
    """Of every option, with codes of one, two and four bytes; and a plain one."""
    rows = (20, 300, 70_000)
    cce = [
        CCEEmbeddingBagConfig(
            name=f"t{i}", num_embeddings=num_ids, embedding_dim=24, feature_names=[f"t{i}"],
            num_chunks=2, num_rows=rows[i % 3], num_helper_rows=7, **options,
        )
        for i, options in enumerate(OPTIONS * 3)
    ]  # fmt: skip
    plain = EmbeddingBagConfig(
        name="plain", num_embeddings=num_ids, embedding_dim=24, feature_names=["plain"]
    )
    return [*cce, plain]


def batch(keys, num_ids, weighted, dtype):
    """Bags of 0 to 3 ids, some of them out of bounds, and values beyond the last bag."""
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, 4, (len(keys) * BATCH,), generator=g)
    ids = torch.randint(num_ids, (int(lengths.sum()) + 5,), generator=g).to(dtype)
    ids[::9] = -1
    weights = torch.rand(len(ids), generator=g) if weighted else None
    end = int(lengths.sum())
    known = KeyedJaggedTensor(keys, ids[:end], None if weights is None else weights[:end],
                              lengths=lengths)  # fmt: skip
    beyond = KeyedJaggedTensor(keys, ids, weights, lengths=lengths)
    return known.to(DEVICE), beyond.to(DEVICE)


def lookups(num_ids):
    """Expansion of all kinds of batches, by tables that are alike and that are not."""
    every = tables(num_ids)
    alike, short = every[:2], [CCEEmbeddingBagConfig(**vars_of(every[1]))]
    warning, ignore, fatal = (
        getattr(BoundsCheckMode, mode) for mode in ("WARNING", "IGNORE", "FATAL")
    )
    for configs, weighted, dtype, mode, narrow in (
        (every, False, torch.int64, warning, True),
        (every, True, torch.int32, ignore, False),
        (alike, False, torch.int64, ignore, True),
        (short, True, torch.int64, warning, False),
        (short, False, torch.int32, fatal, True),
    ):
        module = CCEEmbeddingBagCollection(configs, DEVICE, weighted, mode)
        module.expansion.narrow = narrow
        for features in batch([c.name for c in configs], num_ids, weighted, dtype):
            with contextlib.suppress(ValueError):  # what FATAL is there for
                module.expansion(features, module.bounds_check)
            module.eval()


def vars_of(config):
    """The fields of a table, to make another one of."""
    names = ("name", "num_embeddings", "embedding_dim", "feature_names", "num_chunks", "num_rows",
             "num_helper_rows")  # fmt: skip
    return {name: getattr(config, name) for name in names}


def clusterings(num_ids):
    """Clustering and finalizing with every way to find pairs, to weigh and to start."""
    configs = [c for c in tables(num_ids)[:3] if c.num_rows < num_ids]
    weights = {c.name: torch.arange(num_ids, device=DEVICE) % 3 for c in configs}
    options = [{}, {"samples_per_centroid": 2}, {"weights": weights}, {"init": "k-means++"}]
    options += [{"samples_per_centroid": 2, "weights": weights}, {"memory_limit": 80_000_000}]
    for step, chosen in itertools.product((cluster, finalize), options):
        step(CCEEmbeddingBagCollection(configs, DEVICE), iterations=2, **chosen)


def searches():
    """K-means of narrow, wide and odd points, with more and fewer centroids than a tile."""
    g = torch.Generator().manual_seed(0)
    for n, k, dim in ((1, 1, 4), (200, 5, 32), (700, 200, 20), (300, 130, 150)):
        x = torch.randn(n, dim, generator=g)
        kmeans(x.cuda(), k, 2, init=x[:1].expand(k, dim), backend="triton")  # ties everywhere
        kmeans(x.cuda(), k, 2, backend="triton")


if __name__ == "__main__":
    for part in (lambda: lookups(1001), searches, lambda: clusterings(1001)):
        part()
        torch.cuda.synchronize()
        print("so far nothing failed", flush=True)
    print("every kernel ran")
