"""What a clustering step does to the batches that each of TorchRec's pipelines is ahead with."""

from __future__ import annotations

import inspect
from functools import partial
from unittest import mock

import pytest
import torch
from torchrec.distributed.memory_stashing import MemoryStashingManager
from torchrec.distributed.train_pipeline import (
    EvalPipelineSparseDist,
    PrefetchTrainPipelineSparseDist,
    SparseDataDistUtil,
    StagedTrainPipeline,
    TrainPipelineFusedSparseDist,
    experimental_pipelines,
)
from torchrec.distributed.train_pipeline.experimental_pipelines import (
    EvalPipelineCPUSparse,
    TrainEvalHybridPipelineBase,
    TrainPipelineSparseDistBwdOpt,
    TrainPipelineSparseDistEmbStash,
    TrainPipelineSparseDistOptStash,
    TrainPipelineSparseDistT,
)
from torchrec.distributed.train_pipeline.pipeline_stage import PipelineStage
from torchrec.distributed.train_pipeline.train_pipelines import (
    EvalPipelineFusedSparseDist,
    TrainPipelineSemiSync,
    TrainPipelineSparseDistLite,
)

from cce_torchrec.clustering import cluster, finalize
from tests.distributed.test_failing_rank import state_of
from tests.distributed.test_pipeline import STEPS, build, run
from tests.support.models import CPU, Batch, batch
from tests.support.ranks import on_ranks
from tests.support.streams import DEVICE, STREAM, emulated_streams

REFUSED = r"tables \['t', 'u'\]: 1 of their lookups wait for .*; nothing was clustered"


def with_streams(make, *args):
    """A pipeline that has streams on a CPU too, without which it does not prefetch."""
    pipeline = make(*args)
    pipeline._stream_context = DEVICE.stream
    pipeline._memcpy_stream = pipeline._data_dist_stream = STREAM
    pipeline._prefetch_stream = pipeline._default_stream = STREAM
    return pipeline


def data(rank, steps=STEPS):
    return [Batch(batch(10 * step + rank, False)) for step in range(steps)]


def stashing(make, model, optimizer, device, **kwargs):
    """A pipeline that moves tensors off a GPU between forward and backward; here none is on one."""
    pipeline = make(model, optimizer, device, **kwargs)
    MemoryStashingManager.set_streams(STREAM, STREAM)
    return pipeline


TRAIN = {
    "lite": TrainPipelineSparseDistLite,
    "fused": partial(TrainPipelineFusedSparseDist, emb_lookup_stream="current"),
    "prefetch": partial(with_streams, PrefetchTrainPipelineSparseDist),
    "threads": TrainPipelineSparseDistT,
    "hybrid": TrainEvalHybridPipelineBase,
    "stash": partial(stashing, TrainPipelineSparseDistEmbStash, site_fqn="over"),
}
if hasattr(experimental_pipelines, "TrainPipelinePrefetchEMS"):  # not in torchrec 1.6
    make = experimental_pipelines.TrainPipelinePrefetchEMS
    TRAIN["stash, prefetch"] = partial(stashing, make, site_fqn="over")
# They hook the exchange of outputs, which a rank that is alone does not have: TorchRec's own
# collections are refused there too.
TRAIN_HOOKED = {
    "optimizer in backward": partial(TrainPipelineSparseDistBwdOpt, site_fqn="collection"),
    "optimizer stashed": partial(stashing, TrainPipelineSparseDistOptStash, site_fqn="collection"),
}


def check_equals_the_plain_loop(kind, rank, pipeline):
    outputs, rows = run(kind, rank, None)
    with emulated_streams():
        try:
            piped, piped_rows = run(kind, rank, pipeline)
        finally:
            MemoryStashingManager.reset()  # it is of the process
    for step, (a, b) in enumerate(zip(outputs, piped, strict=True)):
        assert torch.equal(a, b), step
    for name in rows:
        assert torch.equal(rows[name], piped_rows[name]), name


@on_ranks(1, 2)
@pytest.mark.parametrize("kind", ["tw", "rw"])
@pytest.mark.parametrize("pipeline", TRAIN)
def test_pipelines_that_look_up_in_their_step_equal_the_plain_loop(
    rank, world_size, pipeline, kind
):
    check_equals_the_plain_loop(kind, rank, TRAIN[pipeline])


@on_ranks(2)
@pytest.mark.parametrize("pipeline", TRAIN_HOOKED)
def test_pipelines_that_hook_the_exchange_equal_the_plain_loop(rank, world_size, pipeline):
    # DDP's own reducer averages gradients after the backward pass, and so after this optimizer.
    with torch._dynamo.config.patch(optimize_ddp="python_reducer"):
        check_equals_the_plain_loop("tw", rank, TRAIN_HOOKED[pipeline])


EVAL = {
    "sparse-dist": (EvalPipelineSparseDist, 0),
    "fused": (partial(EvalPipelineFusedSparseDist, emb_lookup_stream="current"), 0),
    # It has looked up the batch after the present one, by the tables of before.
    "fused, ahead": (
        partial(
            EvalPipelineFusedSparseDist,
            emb_lookup_stream="current",
            enable_embedding_lookup_prefetch=True,
        ),
        1,
    ),
}
ahead = "enable_embedding_lookup_prefetch"
if ahead not in inspect.signature(TrainPipelineFusedSparseDist.__init__).parameters:
    del EVAL["fused, ahead"]  # torchrec 1.6 has no such option


@on_ranks(2)
@pytest.mark.parametrize("pipeline", EVAL)
def test_evaluation_does_not_hold_up_a_clustering_step(rank, world_size, pipeline):
    make, ahead = EVAL[pipeline]
    model, optimizer = build("tw")
    model.eval()
    expected, found = [], []
    for step, one in enumerate(data(rank)):
        expected.append(model(one)[1])
        if step == 2 + ahead:
            cluster(model)
    model, optimizer = build("tw")
    model.eval()
    with emulated_streams():
        evaluated, source = make(model, optimizer, CPU), iter(data(rank))
        for step in range(STEPS):
            found.append(evaluated.progress(source))
            if step == 2:
                cluster(model)
    for step, (a, b) in enumerate(zip(expected, found, strict=True)):
        assert torch.equal(a, b), step


class DenseBatch(Batch):
    """Of which only what is dense goes to a GPU: nothing."""

    def to(self, device, **_):
        return self


@on_ranks(2)
@pytest.mark.parametrize("depth", [1, 2])
def test_evaluation_with_lookups_on_cpus_uses_the_tables_of_before(rank, world_size, depth):
    """It is as many batches ahead as it is deep."""
    expected, found = [], []
    model, _ = build("tw")
    model.eval()
    for step, one in enumerate(data(rank)):
        expected.append(model(one)[1])
        if step == 2 + depth:
            cluster(model)
    model, optimizer = build("tw")
    model.eval()
    empty_like = torch.empty_like

    def without_pinning(tensor, pin_memory=False, **kwargs):
        return empty_like(tensor, **kwargs)

    with emulated_streams(), mock.patch.object(torch, "empty_like", without_pinning):
        evaluated = EvalPipelineCPUSparse(
            model, optimizer, CPU, pipeline_depth=depth, enable_inplace_copy_batch=True
        )
        source = iter([DenseBatch(one.ids) for one in data(rank)])
        for step in range(STEPS):
            found.append(evaluated.progress(source))
            if step == 2:
                cluster(model)
    for step, (a, b) in enumerate(zip(expected, found, strict=True)):
        assert torch.equal(a, b), step


def steps_of_semi_sync(model, optimizer, start_batch):
    """What takes a step, and what takes the pipeline off the model."""
    pipeline = TrainPipelineSemiSync(model, optimizer, CPU, start_batch=start_batch)
    return pipeline.progress, pipeline.detach


def steps_of_stages(model, optimizer):
    """The same of a staged pipeline whose last stage is the lookup."""
    util = SparseDataDistUtil(model, data_dist_stream=STREAM, embedding_lookup_stream=STREAM)
    stages = [
        PipelineStage("copy", lambda one: one, STREAM),
        PipelineStage(
            "distribute",
            util.start_sparse_data_dist,
            STREAM,
            fill_callback=util.wait_sdd_fill_callback,
        ),
        PipelineStage("look up", util.start_embedding_lookup, STREAM),
    ]
    pipeline = StagedTrainPipeline(stages, compute_stream=STREAM)

    def step(source):
        one = pipeline.progress(source)
        if one is None:
            raise StopIteration
        optimizer.zero_grad()
        loss, out = model(one)
        loss.backward()
        optimizer.step()
        return out

    return step, util.detach


AHEAD = {
    "semi-sync": partial(steps_of_semi_sync, start_batch=0),
    "semi-sync, not yet": partial(steps_of_semi_sync, start_batch=900),
    "staged": steps_of_stages,
}


@on_ranks(1, 2)
@pytest.mark.parametrize("call", [cluster, finalize])
@pytest.mark.parametrize("pipeline", AHEAD)
def test_a_step_is_refused_while_a_pipeline_has_looked_up_the_next_batch(
    rank, world_size, pipeline, call
):
    """On every rank, and nothing is written; once the pipeline is empty it is done."""
    model, optimizer = build("tw")
    sharded = model.module.collection
    with emulated_streams():
        step, detach = AHEAD[pipeline](model, optimizer)
        source = iter(data(rank))
        step(source)
        step(source)
        before = state_of(sharded)
        with pytest.raises(ValueError, match=REFUSED) as error:
            call(model)
        assert "no batch is in flight" in str(error.value)
        after = state_of(sharded)
        assert all(torch.equal(before[name], after[name]) for name in before)
        with pytest.raises(StopIteration):
            while True:  # the remedy
                step(source)
        assert call(model).chunks
        if pipeline == "staged":  # which does not take another iterator
            detach()
            step, _ = AHEAD[pipeline](model, optimizer)
        step(iter(data(rank)))


@on_ranks(2)
def test_batches_of_before_a_load_are_refused_at_their_backward_pass(rank, world_size):
    """Also on the rank that has no codes, which would wait for the other one."""
    model, optimizer = build("tw")
    saved = model.state_dict()
    with emulated_streams():
        step, _ = AHEAD["semi-sync"](model, optimizer)
        source = iter(data(rank))
        step(source)
        step(source)
        model.load_state_dict(saved)
        with pytest.raises(ValueError, match="the codes changed between a lookup and its backward"):
            step(source)


@on_ranks(2)
@pytest.mark.parametrize("on", [0, 1])
def test_a_lookup_that_waits_on_one_rank_is_refused_on_all(rank, world_size, on):
    model, _ = build("tw")
    kept = model(data(rank, 1)[0])
    if rank != on:
        del kept  # and with it the graph
    with pytest.raises(ValueError, match=f"^rank {on}: {REFUSED}"):
        cluster(model)
    kept = None
    assert cluster(model).chunks


def without_grad(model, one):
    with torch.no_grad():
        return model(one)


def evaluated(model, one):
    return model.eval()(one)


def gone_backward(model, one):
    kept = model(one)
    kept[0].backward()
    return kept


def in_a_circle(model, one):
    """Kept by nothing but itself."""
    circle = [model(one)]
    circle.append(circle)


@on_ranks(1, 2)
@pytest.mark.parametrize("lookup", [without_grad, evaluated, gone_backward, in_a_circle])
def test_lookups_that_wait_for_nothing_hold_up_nothing(rank, world_size, lookup):
    model, _ = build("tw")
    kept = lookup(model, data(rank, 1)[0])
    assert cluster(model).chunks
    del kept


@on_ranks(1, 2)
def test_a_second_backward_pass_after_the_step_is_refused(rank, world_size):
    model, _ = build("tw")
    loss, _ = model(data(rank, 1)[0])
    loss.backward(retain_graph=True)
    cluster(model)
    with pytest.raises(ValueError, match=r"tables \['t', 'u'\]: the codes changed between"):
        loss.backward()


@on_ranks(1, 2)
def test_a_gradient_of_before_the_step_is_refused_in_eval_mode_too(rank, world_size):
    """It holds up no step, as nobody may want it; who trains in eval mode gets no other rows."""
    model, _ = build("tw")
    loss, _ = model.eval()(data(rank, 1)[0])
    assert cluster(model).chunks
    with pytest.raises(ValueError, match=r"tables \['t', 'u'\]: the codes changed between"):
        loss.backward()
