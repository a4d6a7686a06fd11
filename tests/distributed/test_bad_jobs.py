"""Jobs that are set up wrongly: an error on every rank within seconds, never a hang."""

from __future__ import annotations

import re
import time
from functools import partial
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torchrec.distributed.planner.types import PlannerError

from cce_torchrec import collectives
from cce_torchrec.checkpoint import load_checkpoint, save_checkpoint
from cce_torchrec.clustering import cluster, finalize
from cce_torchrec.distributed.sharders import get_default_sharders
from cce_torchrec.planning import make_plan, make_planner
from tests.support.jobs import build
from tests.support.models import CPU, SUM, Model, collection, shard_by, tables, vbe_batch
from tests.support.ranks import on_ranks, run_ranks


def cluster_on_one_rank(rank, world_size, caller):
    """The caller learns it by the deadline, the other rank once the caller is gone."""
    model, _ = build("cw", 0)
    collectives.MEETING_SECONDS = 1.0
    began = time.perf_counter()
    if rank == caller:
        with pytest.raises(ValueError, match=r"not every rank came to cluster\(\) in 1 s"):
            cluster(model)
        dist.destroy_process_group()
        dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    else:
        with pytest.raises(RuntimeError):
            dist.all_reduce(torch.zeros(1))
    assert time.perf_counter() - began < 30  # a hang would take the group's timeout of 60 s


@pytest.mark.parametrize("caller", [0, 1])
def test_cluster_on_one_of_two_ranks(caller):
    run_ranks(2, cluster_on_one_rank, caller)


def of_another_spelling(rank, world_size, spelling, path, check):
    """`check` in a job whose group was made so."""
    dist.destroy_process_group()
    store = dist.FileStore(path, world_size)
    dist.init_process_group(spelling, store=store, rank=rank, world_size=world_size)
    assert dist.get_backend() != "gloo"
    check(rank, world_size)


def alone_in_cluster(rank, world_size):
    cluster_on_one_rank(rank, world_size, caller=0)


@pytest.mark.parametrize("spelling", ["cpu:gloo", None])
def test_cluster_on_one_of_two_ranks_of_another_spelling(spelling, tmp_path):
    """The first rank would wait for ever: its first collective is answered by no one."""
    run_ranks(2, of_another_spelling, spelling, str(tmp_path / "store"), alone_in_cluster)


def variable_batch(rank, world_size):
    model = shard_by(make_plan(usual(), tables(SUM), CPU, "tw", row_wise=["p"]), usual())
    with pytest.raises(ValueError, match=r"\['p'\] are cut by rows, for which gloo cannot gather"):
        model(vbe_batch(rank, False))


def test_a_variable_batch_over_gloo_of_another_spelling(tmp_path):
    run_ranks(2, of_another_spelling, "cpu:gloo", str(tmp_path / "store"), variable_batch)


@on_ranks(2)
def test_tables_on_cpus_in_a_job_that_has_nccl_too(rank, world_size):
    """A rank without chunks helps to score where the tables are, not where NCCL would be."""
    model = Model(collection(tables(SUM)[:1]))
    model = shard_by(make_plan(model, tables(SUM)[:1], CPU, "tw"), model)
    assert bool(model.module.collection.codes["t"].chunks) == (rank == 0)
    with mock.patch.object(dist, "get_backend_config", return_value="cpu:gloo,cuda:nccl"):
        assert cluster(model).chunks
    with (
        mock.patch.object(dist, "get_backend_config", return_value="cuda:nccl"),
        pytest.raises(ValueError, match=r"^the tables are on cpu .* by 'cuda:nccl' only"),
    ):
        cluster(model)


@on_ranks(2)
def test_a_rank_outside_of_the_group_of_the_call(rank, world_size):
    model, group = usual(), dist.new_group([0])
    if rank == 0:
        assert cluster(model, process_group=group).chunks
        return
    for call in (
        partial(cluster, model),
        partial(finalize, model),
        partial(load_checkpoint, "folder", model),
        partial(save_checkpoint, "folder", model, step=1),
    ):
        with pytest.raises(ValueError, match=r"^rank 1 is not in the process group of the call"):
            call(process_group=group)


def usual():
    return Model(collection(tables(SUM)))


@on_ranks(2)
def test_a_plan_of_more_ranks(rank, world_size):
    model = usual()
    plan = make_planner(tables(SUM), 4, CPU, "cw").plan(model, get_default_sharders())
    with pytest.raises(ValueError, match=r"the plan puts it on rank 3, the job has 2 ranks"):
        shard_by(plan, model)


@on_ranks(2)
def test_tables_that_do_not_fit(rank, world_size):
    with pytest.raises(PlannerError):
        make_plan(usual(), tables(SUM), CPU, "cw", memory_bytes=10_000)


@on_ranks(2)
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"row_wise": ["t"], "data_parallel": ["t"]}, r"\['t'\] are in data_parallel and in row_w"),
        ({"kind": "gs"}, r"unknown plan 'gs'; choose one of"),
        ({"kind": "cw"}, r"disagree about \(device, options and tables of make_plan\).*'auto'"),
        ({"batch_size": 64}, r"'batch_size': 512.*'batch_size': 64"),
        ({"row_wise": ["x"]}, r"row_wise names \['x'\]"),
    ],
)
def test_a_plan_by_options_of_one_rank(rank, world_size, options, says):
    """Told to rank 1 alone, and refused on both."""
    with pytest.raises(ValueError, match=says):
        make_plan(usual(), tables(SUM), CPU, **(options if rank else {}))


@on_ranks(2)
def test_a_plan_by_tables_of_which_one_is_missing(rank, world_size):
    with pytest.raises(ValueError, match=r"tables \['t'\] are in the model, but not among"):
        make_plan(usual(), tables(SUM)[rank:], CPU)


@on_ranks(2)
@pytest.mark.parametrize("left_out", [["t"], ["p"], ["t", "u"]])
def test_a_plan_that_leaves_tables_out(rank, world_size, left_out):
    model = usual()
    plan = make_plan(model, tables(SUM), CPU, "tw")
    for table in left_out:
        del plan.plan["collection"][table]
    says = (
        rf"no entry for tables {re.escape(str(left_out))} of the .* it has \[.*\. Make the plan of"
    )
    with pytest.raises(ValueError, match=says):
        shard_by(plan, model)
