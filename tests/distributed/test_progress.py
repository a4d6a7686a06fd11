"""TrainingProgress: where a job goes on, and what it refuses before anything is loaded."""

import logging

import pytest
import torch
from torch.optim.lr_scheduler import MultiStepLR, StepLR

from cce_torchrec import ClusteringSchedule, TrainingProgress, checkpoint_info, latest_checkpoint
from tests.support.jobs import build, outputs, step
from tests.support.ranks import on_ranks

NEVER, EVERY = ClusteringSchedule.never(), ClusteringSchedule.every(3)


def job(folder, seed=0, scheduler=MultiStepLR, **options):
    """Model, its optimizer and a scheduler, and how far they are."""
    model, dense = build("tw", seed)
    schedulers = [scheduler(dense, [2])] if scheduler is MultiStepLR else [scheduler(dense, 2)]
    numbers = {"epochs": 2, "steps_per_epoch": 4, "schedule": NEVER} | options
    progress = TrainingProgress(folder, model, [dense], schedulers, **numbers)
    return model, dense, schedulers[0], progress


def train(made, steps):
    model, dense, scheduler, progress = made
    for _ in range(steps):
        step(model, dense, progress.step)
        scheduler.step()
        progress.advance()


def place(progress):
    return progress.step, progress.epoch, progress.step_in_epoch


@on_ranks(1, 2)
def test_a_new_job_starts_at_the_beginning_and_counts(rank, world_size, tmp_path):
    made = job(tmp_path)
    assert place(made[-1]) == (0, 0, 0) and latest_checkpoint(tmp_path) is None
    train(made, 5)
    assert place(made[-1]) == (5, 1, 1)


@on_ranks(2)
@pytest.mark.parametrize("done", [4, 6])
def test_a_restart_goes_on_after_what_was_saved(rank, world_size, done, tmp_path):
    made = job(tmp_path, save_every=3)
    train(made, done)
    saved = checkpoint_info(tmp_path).step
    assert saved == done  # the end of an epoch, and every third step
    rate, random = made[1].param_groups[0]["lr"], torch.get_rng_state()
    again = job(tmp_path, seed=1, save_every=3)
    assert place(again[-1]) == (saved, saved // 4, saved % 4)
    assert all(map(lambda a, b: (a == b).all(), outputs(again[0]), outputs(made[0])))
    assert again[1].param_groups[0]["lr"] == rate and again[2].last_epoch == saved
    assert torch.equal(torch.get_rng_state(), random)


@on_ranks(2)
def test_the_schedule_is_that_for_training_with_finalize_unless_given(rank, world_size, tmp_path):
    made = job(tmp_path, steps_per_epoch=10, schedule=None, save_every=19)
    train(made, 19)
    info = checkpoint_info(tmp_path)
    assert info.schedule == ClusteringSchedule.for_training(2, 10, finalize=True)
    assert info.step == 19
    assert info.finalized == ["collection.t", "collection.u"]
    assert place(job(tmp_path, steps_per_epoch=10, schedule=None)[-1]) == (19, 1, 9)


@on_ranks(2)
@pytest.mark.parametrize(("steps_per_epoch", "position"), [(8, (12, 1, 4)), (2, (3, 1, 1))])
def test_of_epochs_with_other_numbers_of_steps_as_much_is_done(
    rank, world_size, steps_per_epoch, position, tmp_path
):
    train(job(tmp_path, save_every=6), 6)
    lines, handler = [], logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("cce_torchrec").addHandler(handler)
    progress = job(tmp_path, steps_per_epoch=steps_per_epoch)[-1]
    logging.getLogger("cce_torchrec").removeHandler(handler)
    assert place(progress) == position
    told = [line for line in lines if f"an epoch had 4 steps, and has {steps_per_epoch}" in line]
    assert len(told) == (rank == 0)


@on_ranks(2)
def test_of_unequal_numbers_of_batches_the_least_counts(rank, world_size, tmp_path):
    assert job(tmp_path, steps_per_epoch=5 - rank)[-1].steps_per_epoch == 4


@on_ranks(2)
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ([{"epochs": 2}, {"epochs": 3}], r"ranks disagree about \(epochs, save_every, schedule"),
        ([{}, {"save_every": 0}], "rank 1: .*save_every 0"),
        ([{"steps_per_epoch": 0}, {}], "rank 0: .*steps_per_epoch 0"),
        ([{"epochs": -1}] * 2, "epochs -1"),
        ([{"scheduler": StepLR}] * 2, r"the schedulers \['MultiStepLR'\], and the job \["),
        ([{"scheduler": StepLR}, {}], r"ranks disagree about \(.*schedulers\): .*'StepLR'"),
        (
            [{"schedule": EVERY}, {"schedule": EVERY, "clustering": {"iterations": 3}}],
            r"ranks disagree about \(clustering\): \[\(6, .*\(3, ",
        ),
        (
            [{"schedule": EVERY}, {"schedule": EVERY, "clustering": {"foo": 3}}],
            "rank 1: a clustering has no argument 'foo' here",
        ),
        ([{}, {"schedule": 5}], "rank 1: schedule 5 is no ClusteringSchedule"),
    ],
    ids=[
        "other epochs",
        "save_every",
        "steps_per_epoch",
        "epochs",
        "schedulers",
        "other schedulers",
        "other options",
        "options",
        "schedule",
    ],
)
def test_it_is_refused_on_every_rank_and_nothing_is_loaded(
    rank, world_size, changed, message, tmp_path
):
    train(job(tmp_path), 4)
    model, dense = build("tw", 3)
    before = outputs(model)
    options = {"epochs": 2, "steps_per_epoch": 4, "schedule": NEVER} | changed[rank]
    scheduler = options.pop("scheduler", None)
    schedulers = [StepLR(dense, 2) if scheduler else MultiStepLR(dense, [2])]
    with pytest.raises(ValueError, match=message):
        TrainingProgress(tmp_path, model, [dense], schedulers, **options)
    assert all(map(lambda a, b: (a == b).all(), outputs(model), before))


@on_ranks(2)
def test_data_parallel_tables_need_their_optimizer_at_the_start(rank, world_size, tmp_path):
    model, both = build("dp", 0)
    own, dense = (optimizer for _, optimizer in both.optimizers)
    numbers = {"epochs": 2, "steps_per_epoch": 4}
    for given in ([], [dense]):
        with pytest.raises(
            ValueError, match=r"data-parallel and the optimizer .*, whose state must"
        ):
            TrainingProgress(tmp_path, model, given, **numbers)
    with pytest.raises(ValueError, match=r"several .*optimizers\[0\] .*optimizers\[1\]"):
        TrainingProgress(tmp_path, model, [own, both], **numbers)
    for given in ([dense, own], [both]):
        progress = TrainingProgress(tmp_path, model, given, **numbers)
        assert progress.clustering["optimizer"] is given[-1]


@on_ranks(2)
def test_what_is_late_is_finalized_on_every_rank(rank, world_size, tmp_path):
    """Also where a rank has no chunk."""
    made = job(tmp_path, epochs=3, steps_per_epoch=10, schedule=None)[-1]
    made.step = 19
    made.save()
    model, *_, progress = job(tmp_path, steps_per_epoch=10, schedule=None)
    progress.advance()
    configs = model.module.collection.embedding_bag_configs()
    assert [c.helper_rows for c in configs if hasattr(c, "num_rows")] == [0, 0]
    assert checkpoint_info(tmp_path).finalized == ["collection.t", "collection.u"]


@on_ranks(1, 2)
def test_an_evaluation_of_no_checkpoint_is_refused(rank, world_size, tmp_path):
    with pytest.raises(ValueError, match=f"no checkpoint in {tmp_path}"):
        job(tmp_path, epochs=0)
    train(job(tmp_path), 4)
    assert place(job(tmp_path, epochs=0)[-1]) == (4, 1, 0)
