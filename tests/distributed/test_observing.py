"""What a job tells of itself: a log line a call, ranges of a profile, tables by their own names."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from cce_torchrec import (
    CCEEmbeddingCollection,
    cluster,
    finalize,
    load_checkpoint,
    save_checkpoint,
    spans,
)
from cce_torchrec.checkpoint.tables import describe_tables
from tests.support.models import (
    MEAN,
    SUM,
    Loss,
    Model,
    SequenceNet,
    batch,
    collection,
    shard,
    tables,
)
from tests.support.ranks import on_ranks


@contextmanager
def logged():
    """What the package logs inside at INFO, as a list of messages."""
    logger, lines = logging.getLogger("cce_torchrec"), []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append((record.levelname, record.getMessage()))
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def sharded(kind="tw"):
    return shard(Loss(), tables(MEAN), kind)


def train(model, rank):
    loss, _ = model(Batch(rank))
    loss.backward()


class Batch:
    """What `Loss` reads of a batch."""

    def __init__(self, rank):
        self.ids = batch(rank, False)


@on_ranks(1, 2)
@pytest.mark.parametrize("call", [cluster, finalize])
def test_a_clustering_logs_one_line_on_the_first_rank(rank, world_size, call):
    model = sharded()
    with logged() as lines:
        report = call(model)
    assert len(lines) == (rank == 0)
    for level, line in lines:
        assert level == "INFO" and line.startswith(f"{call.__name__}: 2 tables, 6 chunks in ")
        assert f"{report.seconds:.2f} s" in line
        assert "objective" in line and "% of codes changed, " in line and "empty clusters" in line
        assert line.endswith("0 tables left alone")


@on_ranks(1, 2)
def test_a_clustering_of_nothing_logs_its_line_too(rank, world_size):
    model = sharded()
    finalize(model)
    with logged() as lines:
        cluster(model)
    told = [line for level, line in lines if level == "INFO"]
    assert len(told) == (rank == 0)
    assert all(line.startswith("cluster: 0 tables, 0 chunks in ") for line in told)
    assert all(line.endswith("2 tables left alone") for line in told)


@on_ranks(1, 2)
@pytest.mark.parametrize("blocking", [True, False])
def test_saving_and_loading_log_path_and_bytes(rank, world_size, blocking, tmp_path):
    model = sharded()
    with logged() as lines:
        path = save_checkpoint(tmp_path, model, step=7, blocking=blocking)
        path = path if blocking else path.result()
        load_checkpoint(tmp_path, model)
    assert len(lines) == 2 * (rank == 0)
    manifest = {path / "manifest.json"}
    size = sum(p.stat().st_size for p in set(path.iterdir()) - manifest if p.is_file())
    for verb, (level, line) in zip(("saved", "loaded"), lines, strict=False):
        assert level == "INFO"
        assert line.startswith(f"{verb} {path}: step 7, 3 tables, {size:,} bytes in "), line


@on_ranks(1, 2)
@pytest.mark.parametrize("kind", ["tw", "rw"])
def test_a_profile_has_the_stages(rank, world_size, kind):
    model = sharded(kind)
    train(model, rank)  # the first batch makes what later ones use
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        train(model, rank)
        cluster(model)
    names = {event.key for event in recorded.key_averages()}
    stages = {"input_check", "input_dist", "expand", "output", "cluster, prepare"}
    stages |= {"code_fetch"} if kind == "rw" else set()
    assert {f"## cce {stage} ##" for stage in stages} <= names, sorted(names)
    assert any(name.startswith("## cce lookup") for name in names)
    phases = {name for name in names if name.startswith("## cce cluster collection.t, chunk 0, ")}
    if rank == 0 or kind == "rw":  # which has the table's first chunk
        assert {name.split(", ")[-1] for name in phases} == {
            "solve ##", "pairs ##", "k-means ##", "codes ##", "write ##"
        }  # fmt: skip


@pytest.mark.parametrize(
    "unsharded",
    [Model(collection(tables(MEAN))), Model(CCEEmbeddingCollection(SequenceNet.configs()))],
)
def test_a_profile_of_an_unsharded_model(unsharded):
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        unsharded(batch(0, False))
    names = {event.key for event in recorded.key_averages()}
    stages = ["input_check", "expand", "lookup", "output"]
    assert {f"## cce {stage} ##" for stage in stages} <= names, sorted(names)


@on_ranks(1, 2)
def test_without_a_profiler_no_range_is_made(rank, world_size):
    model = sharded("rw")
    with mock.patch.object(spans, "record_function") as made:
        train(model, rank)
        cluster(model)
    assert made.call_count == 0


class Holder(nn.Module):
    """A module around a model that is wrapped already."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner


def in_a_module():
    return Holder(shard(Model(collection(tables(SUM))), tables(SUM), "tw"))


def in_a_list():
    model = nn.Sequential(collection(tables(SUM)))
    return shard(model, tables(SUM), "tw")


def replicated():
    model = Model(collection(tables(SUM)))  # equal on all ranks; gloo sends no int16
    return DistributedDataParallel(model, init_sync=False, broadcast_buffers=False)


def sequences():
    return shard(SequenceNet(SequenceNet.configs()), SequenceNet.configs(), "tw")


def unsharded_sequences():
    return SequenceNet(SequenceNet.configs())


@on_ranks(2)
@pytest.mark.parametrize(
    ("make", "prefix"),
    [
        (sharded, "collection"),
        (in_a_list, "0"),
        (in_a_module, "inner.collection"),
        (replicated, "collection"),
        (sequences, "collection"),
        (unsharded_sequences, "collection"),
    ],
)
def test_tables_have_their_own_names(rank, world_size, make, prefix):
    torch.manual_seed(0)
    model = make()
    report = cluster(model, tables=[f"{prefix}.t"])
    assert {chunk.table for chunk in report.chunks} == {f"{prefix}.t"}
    assert report.left_alone == {f"{prefix}.u": "not among tables"}
    assert {chunk.table for chunk in finalize(model).chunks} == {f"{prefix}.t", f"{prefix}.u"}
    if make in (sharded, in_a_list, sequences):  # as a checkpoint has them
        assert f"{prefix}.t" in describe_tables(model)
