"""Checkpoints of several ranks in an object store, of values that diverged, and behind training."""

from __future__ import annotations

import os
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from cce_torchrec.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from cce_torchrec.checkpoint.tensor_files import TensorWriter
from cce_torchrec.clustering import cluster
from cce_torchrec.train.records import Records
from cce_torchrec.train.trainer import Trainer
from tests.support.jobs import assert_same_outputs, build, outputs, step
from tests.support.ranks import on_ranks
from tests.support.s3 import make_bucket, needs_s3, s3_server

STORE = "s3://ranks/run"


@pytest.fixture(scope="module")
def s3():
    """The environment in which ranks find the server."""
    with s3_server() as environment:
        make_bucket("ranks")
        yield environment


def trained(kind, seed):
    model, dense = build(kind, seed)
    step(model, dense, 1)
    cluster(model, optimizer=dense)
    return model, dense


@needs_s3
@on_ranks(2)
@pytest.mark.parametrize("blocking", [True, False])
def test_an_object_store_on_ranks(rank, world_size, blocking, s3):
    """Saved spread, loaded together and unsharded."""
    with mock.patch.dict(os.environ, s3):
        model, dense = trained("cw", 1)
        handle = save_checkpoint(STORE, model, step=1, optimizers=[dense], blocking=blocking)
        path = handle if blocking else handle.result()
        assert latest_checkpoint(STORE) == path
        expected = outputs(model)
        for kind in ("tw", "unsharded"):
            other, its_dense = build(kind, 5)
            load_checkpoint(STORE, other, optimizers=[its_dense])
            assert_same_outputs(other, expected)


@on_ranks(2)
def test_values_that_are_not_finite_are_refused_on_all_ranks(rank, world_size, tmp_path):
    model, _ = trained("cw", 1)
    good = save_checkpoint(tmp_path, model, step=1, keep=1)
    if rank == 1:
        weights = [v for name, v in model.state_dict().items() if name.endswith("#1.weight")]
        weights[0].local_shards()[0].tensor.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"rank 1: table 'collection.[tu]' .*: NaN or infinite"):
        save_checkpoint(tmp_path, model, step=2, keep=1)
    dist.barrier()
    assert [path.name for path in tmp_path.iterdir()] == [good.name]


@on_ranks(2)
def test_a_rank_that_fails_in_the_background(rank, world_size, tmp_path):
    model, _ = trained("tw", 1)
    good = save_checkpoint(tmp_path, model, step=1)
    error = OSError("no space left") if rank == 1 else None
    write = TensorWriter.write if error is None else mock.Mock(side_effect=error)
    with mock.patch.object(TensorWriter, "write", write):
        handle = save_checkpoint(tmp_path, model, step=2, blocking=False)
        with pytest.raises(ValueError, match="rank 1: no space left"):
            handle.result()
    dist.barrier()
    assert [path.name for path in tmp_path.iterdir()] == [good.name]


@on_ranks(2)
def test_a_failure_that_one_rank_has_seen_is_raised_on_all_by_the_next_call(
    rank, world_size, tmp_path
):
    """A rank that went on alone would wait for the others in the next collective call."""
    model, _ = trained("tw", 1)
    with mock.patch.object(TensorWriter, "write", mock.Mock(side_effect=OSError("no space left"))):
        handle = save_checkpoint(tmp_path, model, step=1, blocking=False)
        if rank == 0:
            with pytest.raises(ValueError, match="no space left"):
                handle.result()
        dist.barrier()
    with pytest.raises(ValueError, match="rank 1: no space left"):
        save_checkpoint(tmp_path, model, step=2)
    assert save_checkpoint(tmp_path, model, step=2).exists()


@on_ranks(2)
@pytest.mark.parametrize(
    "asked", [{"blocking": False}, {"keep": 3}, {"pin": "best"}, {"step": 2}, {"check_finite": 0}]
)
def test_ranks_that_ask_for_different_things_are_told(rank, world_size, tmp_path, asked):
    model, _ = trained("tw", 1)
    with pytest.raises(ValueError, match=r"ranks disagree about .step, keep, pin, check_finite, b"):
        save_checkpoint(tmp_path, model, **({"step": 1} | (asked if rank else {})))
    assert latest_checkpoint(tmp_path) is None


@on_ranks(2)
@pytest.mark.parametrize("wrong", [{"keep": 0}, {"pin": "a/b"}, {"step": -1}])
def test_what_one_rank_asks_for_in_vain_is_refused_on_all(rank, world_size, tmp_path, wrong):
    model, _ = trained("tw", 1)
    with pytest.raises(ValueError, match=r"^rank 1: (keep 0|pin 'a/b'|step -1) "):
        save_checkpoint(tmp_path, model, **({"step": 1} | (wrong if rank else {})))


@on_ranks(2)
@pytest.mark.parametrize("asked", [{"tables": ["t"]}, {"grow": ["t"]}, {"strict": False}])
def test_ranks_that_load_different_things_are_told(rank, world_size, tmp_path, asked):
    model, _ = trained("tw", 1)
    save_checkpoint(tmp_path, model, step=1)
    before = outputs(model)
    with pytest.raises(ValueError, match=r"ranks disagree about .tables, grow, strict, learning"):
        load_checkpoint(tmp_path, model, **(asked if rank else {}))
    assert_same_outputs(model, before)
    load_checkpoint(tmp_path, model, tables=["t", "u"] if rank else ["u", "t"])


@on_ranks(2)
def test_an_out_that_the_first_rank_cannot_write_is_told_to_all(rank, world_size, tmp_path):
    (tmp_path / "file").touch()
    args = SimpleNamespace(resume=False, out=tmp_path / "file" / "run")
    run = SimpleNamespace(args=args, rank=rank, records=Records())
    with pytest.raises(ValueError, match=r"^rank 0: .*/file/run cannot be written"):
        Trainer.run(run)


@on_ranks(2)
def test_training_goes_on_while_it_is_written(rank, world_size, tmp_path):
    """Steps and a clustering, over another group than the thread's; what was staged is saved."""
    (model, dense), (other, its_dense) = trained("cw", 1), build("cw", 2)
    expected = outputs(model)
    handle = save_checkpoint(tmp_path, model, step=1, optimizers=[dense], blocking=False)
    for seed in range(5):
        step(model, dense, seed)
    cluster(model)
    after = outputs(model)
    report = load_checkpoint(tmp_path, other, optimizers=[its_dense])
    assert handle.done() and report.path == handle.result()
    assert_same_outputs(other, expected)
    for seed in range(5):
        step(other, its_dense, seed)
    cluster(other)
    assert_same_outputs(other, after)
    assert torch.equal(*[next(iter(m.parameters())) for m in (model, other)])
