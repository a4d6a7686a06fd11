"""Plans in bytes: what is predicted is what is allocated, on every rank."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torchrec
from torch import nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from cce_torchrec import CCEEmbeddingBagConfig
from cce_torchrec.distributed.sharders import get_default_sharders
from cce_torchrec.planning import make_planner, plan_report
from tests.support.models import CPU, collection, shard_by
from tests.support.ranks import on_ranks


def configs():
    return [
        CCEEmbeddingBagConfig(
            name="t", num_embeddings=200_000, embedding_dim=32, feature_names=["f"], num_rows=900
        ),
        CCEEmbeddingBagConfig(
            name="u", num_embeddings=100_000, embedding_dim=16, feature_names=["g"], num_rows=200,
            num_chunks=2, track_seen=True,
        ),
        EmbeddingBagConfig(
            name="p", num_embeddings=20_000, embedding_dim=8, feature_names=["h"]
        ),
    ]  # fmt: skip


def allocated(sharded):
    """Bytes of weights, optimizer state, codes and bits on this rank."""
    numbers = ("clusterings", "num_helper_rows")
    tensors = [v for k, v in sharded.codes.named_buffers() if not k.endswith(numbers)]
    for lookup in sharded.embedding_bag_collection._lookups:
        for kernel in lookup._emb_modules:
            tbe = kernel.emb_module
            tensors += list(tbe.split_embedding_weights())
            tensors += [v for state in tbe.get_optimizer_state() for v in state.values()]
    return sum(t.numel() * t.element_size() for t in tensors)


@on_ranks(2)
@pytest.mark.parametrize("optimizer", [torchrec.optim.RowWiseAdagrad, torch.optim.Adagrad])
@pytest.mark.parametrize("kind", ["tw", "cw", "rw"])
def test_predicted_bytes_are_allocated_bytes(rank, world_size, kind, optimizer):
    model = nn.ModuleDict({"sparse": collection(configs(), (optimizer, {"lr": 0.1}))})
    planner = make_planner(configs(), world_size, CPU, kind, batch_size=2)
    plan = planner.collective_plan(model, get_default_sharders(), dist.group.WORLD)
    report = plan_report(model, plan, world_size)
    # TorchRec adds inputs and outputs of the batch, a few bytes here.
    planned = [None]
    if rank == 0:
        shards = [s for option in planner._best_plan for s in option.shards]
        planned = [[sum(s.storage.ddr for s in shards if s.rank == r) for r in range(world_size)]]
    dist.broadcast_object_list(planned)
    found = allocated(shard_by(plan, model).module["sparse"])
    assert report.rank_bytes(rank) == pytest.approx(found, rel=0.02)
    assert planned[0][rank] == pytest.approx(found, rel=0.02)
    text = str(report)
    assert "sparse.t" in text and f"rank {rank}: {report.rank_bytes(rank):,}" in text
