"""TrainPipelineSparseDist equals the plain loop, clustering between steps included."""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch import nn
from torchrec.distributed.train_pipeline import TrainPipelineBase, TrainPipelineSparseDist

from cce_torchrec.clustering import cluster
from cce_torchrec.clustering.local_chunks import fused_rows, uncached
from cce_torchrec.distributed.caches import bypassed, forget_prefetched
from cce_torchrec.planning import make_plan
from tests.support.models import CPU, MEAN, Batch, Loss, batch, shard_by, step_outputs, tables
from tests.support.ranks import on_ranks

STEPS = 7


def build(kind):
    torch.manual_seed(0)
    model = Loss()
    plan = make_plan(model, tables(MEAN), CPU, kind)
    torch.manual_seed(1)
    model = shard_by(plan, model)
    dense = [p for name, p in model.named_parameters() if "over" in name]
    return model, torch.optim.SGD(dense, lr=0.1)


def run(kind, rank, pipeline_class):
    """Outputs of every step, and the tables at the end."""
    model, _ = build(kind)
    data = [Batch(batch(10 * step + rank, False)) for step in range(STEPS)]
    outputs = step_outputs(model, data, pipeline_class, cluster_after=(2, 4))
    rows = {n: w.clone() for n, (w, _) in fused_rows(model.module.collection).items()}
    return outputs, rows


@on_ranks(1, 2)
@pytest.mark.parametrize("pipeline", [TrainPipelineSparseDist, TrainPipelineBase])
@pytest.mark.parametrize("kind", ["tw", "cw", "rw"])
def test_pipelines_equal_the_plain_loop(rank, world_size, kind, pipeline):
    outputs, rows = run(kind, rank, None)
    piped, piped_rows = run(kind, rank, pipeline)
    for step, (a, b) in enumerate(zip(outputs, piped, strict=True)):
        assert torch.equal(a, b), step
    for name in rows:
        assert torch.equal(rows[name], piped_rows[name]), name


@on_ranks(1, 2)
@pytest.mark.parametrize("clustered", [False, True])
@pytest.mark.parametrize("kind", ["tw", "cw", "rw"])
def test_prefetched_ids_are_expanded_once(rank, world_size, kind, clustered):
    """What the prefetch pipeline (CUDA only) does to the module: ids are expanded once a batch, and
    once more where a clustering step came between."""
    model = build(kind)[0]
    sharded = model.module.collection
    context = sharded.create_context()
    received = sharded.input_dist(context, batch(rank, False)).wait().wait()
    with mock.patch.object(sharded, "_expand", wraps=sharded._expand) as expand:
        sharded.prefetch(received, ctx=context)
        rows = context.in_flight.rows
        if clustered:
            cluster(model)
        out = sharded.compute_and_output_dist(context, received).wait().values()
        assert expand.call_count == 2
    looked_up = sharded._expand(context, received)
    assert clustered or looked_up is rows
    assert torch.equal(out, sharded(batch(rank, False)).wait().values())


class Cached:
    """An FBGEMM module with a cache, as far as clustering and prefetching touch it."""

    def __init__(self, lines):
        self.lxu_cache_weights = torch.zeros(lines, 4)
        self.lxu_cache_locking_counter = torch.ones(2)
        self.timesteps_prefetched, self.lxu_cache_locations_list = [3, 4], [7, 8]
        self.done = []

    def flush(self):
        self.done.append("flush")

    def reset_cache_states(self):
        self.done.append("reset")


def lookup_of(*modules):
    kernels = [
        SimpleNamespace(_config=SimpleNamespace(embedding_tables=[]), emb_module=module)
        for module in modules
    ]
    return SimpleNamespace(_emb_modules=kernels)


def test_caches_are_written_back_before_and_emptied_after():
    cached, without = Cached(2), Cached(0)
    with pytest.raises(ValueError), bypassed([lookup_of(without, cached)]):
        assert cached.done == ["flush"]
        cached.done.append("clustering")
        raise ValueError
    assert cached.done == ["flush", "clustering", "reset"] and not without.done
    assert not cached.lxu_cache_locking_counter.any()
    forget_prefetched([lookup_of(cached)])
    assert (cached.timesteps_prefetched, cached.lxu_cache_locations_list) == ([4], [8])


def test_clustering_waits_for_the_streams_of_pipelines(monkeypatch):
    done = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("wait"))
    with uncached(nn.Module()):
        done.append("clustering")
    assert done == ["wait", "clustering", "wait"]
