"""What TrainingProgress refuses, chooses and tells before a job trains."""

import logging
from unittest import mock

import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import LinearLR, StepLR

from cce_torchrec import (
    ClusteringSchedule,
    TrainingProgress,
    checkpoint_info,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from cce_torchrec.checkpoint import progress as module
from tests.support.jobs import assert_same_outputs, build, outputs, step
from tests.support.models import Net

NEVER = ClusteringSchedule.never()


def job(folder, schedulers=(), **options):
    """An unsharded model, the optimizer of its dense layer, and how far they are."""
    model, dense = build("unsharded", 0)
    numbers = {"epochs": 2, "steps_per_epoch": 10} | options
    return model, TrainingProgress(folder, model, [dense], schedulers, **numbers)


def saved_at(folder, at, **options):
    """A job that was saved after so many steps, which changed nothing."""
    model, progress = job(folder, **options)
    progress.step = at
    progress.save()
    return model


@pytest.mark.parametrize(
    ("before", "at", "after", "final", "now"),
    [
        ({"epochs": 3}, 19, {"epochs": 2}, 18, 19),
        (
            {"schedule": ClusteringSchedule.every(5, final=18)},
            12,
            {"schedule": ClusteringSchedule.every(5, final=18), "steps_per_epoch": 20},
            18,
            24,
        ),
        ({"epochs": 1, "steps_per_epoch": 100}, 89, {"epochs": 1, "steps_per_epoch": 5}, 4, 4),
        ({"schedule": ClusteringSchedule.every(7)}, 14, {}, 18, 14),
        ({"schedule": NEVER}, 18, {}, 18, 18),
    ],
    ids=["fewer epochs", "more steps", "rounding", "not yet", "no schedule before"],
)
def test_a_job_past_its_final_step_is_finalized_after_the_next(
    before, at, after, final, now, tmp_path, caplog
):
    saved_at(tmp_path, at, **before)
    _, progress = job(tmp_path, **after)
    late = now >= final
    assert (progress.step, progress._when.final) == (now, final)
    said = f"finalizes after step {final}, and the job goes on from step {now} with tables"
    assert (said in caplog.text) == late
    with mock.patch.object(module, "finalize") as finalize:
        progress.advance()
        progress.advance()
    assert finalize.call_count == late


def test_what_was_late_is_finalized_once(tmp_path, caplog):
    saved_at(tmp_path, 19, epochs=3)
    model, progress = job(tmp_path)
    step(model, torch.optim.SGD(model.over.parameters(), 0.1), 0)
    progress.advance()  # the end of an epoch, which is saved
    assert checkpoint_info(tmp_path).finalized == ["collection.t", "collection.u"]
    caplog.clear()
    with mock.patch.object(module, "finalize") as finalize:
        job(tmp_path, epochs=4, schedule=ClusteringSchedule.every(5, final=18))[1].advance()
    assert not finalize.called and "finalizes after" not in caplog.text


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"clustering": {"foo": 1}},
            "a clustering has no argument 'foo' here; it takes .*'iterations'",
        ),
        ({"clustering": {"init": "main"}}, "init 'main' has no start .*would end so"),
        ({"clustering": {"iterations": 0}}, "iterations 0 must be at least 1"),
        ({"clustering": {"iterations": "3"}}, "cluster cannot take .*'3'"),
        ({"clustering": {"backend": "fast"}}, "unknown K-means backend 'fast'"),
        ({"clustering": {"tables": ["x"]}}, "tables: no table 'x'; the model has"),
        ({"clustering": {"weights": {"p": torch.ones(40)}}}, r"weights for \['p'\], which do not"),
        ({"clustering": {"weights": {"t": torch.ones(3)}}}, r"weights must be integers \[300\]"),
        ({"clustering": {"metric": {"t": torch.ones(3)}}}, r"metric must be \[num_chunks, 4, 4\]"),
        ({"clustering": {"weights": "seen"}}, "needs a table with track_seen"),
        ({"clustering": None}, "clustering None is no dictionary"),
        ({"schedule": 5}, "schedule 5 is no ClusteringSchedule"),
        ({"epochs": 2.0}, "epochs 2.0 is no whole number"),
        ({"steps_per_epoch": 10.0}, "steps_per_epoch 10.0 is no whole number; convert it by int"),
        ({"steps_per_epoch": None}, "steps_per_epoch None is no whole number"),
        ({"save_every": 2.5}, "save_every 2.5 is no whole number"),
        ({"schedulers": 5}, "schedulers 5 are no list"),
        ({"schedulers": [None]}, r"schedulers\[0\] is a NoneType, and no scheduler"),
    ],
    ids=str,
)
def test_what_could_only_fail_later_is_refused_at_the_start(changed, message, tmp_path):
    """Also where a checkpoint is there, of which nothing is loaded then."""
    saved_at(tmp_path, 5)
    model, dense = build("unsharded", 1)
    before = outputs(model)
    with pytest.raises(ValueError, match=message):
        TrainingProgress(tmp_path, model, [dense], **{"epochs": 2, "steps_per_epoch": 10} | changed)
    assert_same_outputs(model, before)


def test_a_model_without_tables_to_cluster_is_refused(tmp_path):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ValueError, match=r"no CCE table .*schedule=ClusteringSchedule.never\(\)"):
        TrainingProgress(tmp_path, model, [optimizer], epochs=1, steps_per_epoch=10)
    TrainingProgress(tmp_path, model, [optimizer], epochs=1, steps_per_epoch=10, schedule=NEVER)


@pytest.mark.parametrize("make", [np.int64, np.int32, torch.tensor])
def test_numbers_of_any_kind_are_saved(make, tmp_path):
    numbers = {name: make(n) for name, n in (("epochs", 2), ("steps_per_epoch", 3))}
    _, progress = job(tmp_path, **numbers, save_every=make(2), schedule=NEVER)
    progress.advance()
    progress.advance()
    assert job(tmp_path, **numbers, schedule=NEVER)[1].step == 2


@pytest.mark.parametrize("call", ["save_checkpoint", "load_checkpoint", "TrainingProgress"])
def test_what_is_no_list_of_optimizers_is_refused(call, tmp_path):
    saved_at(tmp_path, 5)
    model, dense = build("unsharded", 0)
    calls = {
        "save_checkpoint": lambda given: save_checkpoint(tmp_path, model, step=1, optimizers=given),
        "load_checkpoint": lambda given: load_checkpoint(tmp_path, model, optimizers=given),
        "TrainingProgress": lambda given: TrainingProgress(
            tmp_path, model, given, epochs=2, steps_per_epoch=10
        ),
    }
    with pytest.raises(ValueError, match=r"optimizers is one Adam; give a list of it, \[optimizer"):
        calls[call](dense)
    with pytest.raises(ValueError, match="optimizers None are no list"):
        calls[call](None)
    with pytest.raises(ValueError, match=r"optimizers\[1\] is a generator, and no optimizer"):
        calls[call]([dense, model.parameters()])


def of_tables_and_dense(model):
    """An optimizer of the tables and one of the dense layer."""
    own = [p for name, p in model.named_parameters() if "over" not in name]
    return torch.optim.Adagrad(own, 0.1), torch.optim.SGD(model.over.parameters(), 0.1)


@pytest.mark.parametrize("first", [0, 1])
def test_the_optimizer_that_has_the_tables_follows(first, tmp_path):
    model = Net(Net.configs())
    both = of_tables_and_dense(model)
    given = both if first == 0 else both[::-1]
    progress = TrainingProgress(
        tmp_path, model, given, epochs=1, steps_per_epoch=9, schedule=ClusteringSchedule.every(2)
    )
    for seed in range(2):
        for optimizer in given:
            optimizer.zero_grad()
        step(model, both[0], seed)
        both[1].step()
        sums = [value["sum"].clone() for value in both[0].state.values()]
        progress.advance()
    now = [value["sum"] for value in both[0].state.values()]
    assert not all(torch.equal(a, b) for a, b in zip(sums, now, strict=True))


def test_tables_in_several_optimizers_are_refused(tmp_path):
    model = Net(Net.configs())
    own, dense = of_tables_and_dense(model)
    parts = [p for name, p in model.named_parameters() if "t#" in name]
    rest = [p for name, p in model.named_parameters() if "u#" in name]
    halves = [torch.optim.SGD(parts, 0.1), torch.optim.SGD(rest, 0.1)]
    everything = torch.optim.SGD(model.parameters(), 0.1)
    for given in ([own, everything], [dense, *halves], [own, dense, halves[1]]):
        with pytest.raises(ValueError, match=r"several optimizers .*optimizers\[\d\] those of \["):
            TrainingProgress(tmp_path, model, given, epochs=1, steps_per_epoch=9)
    chosen = {"optimizer": own}
    TrainingProgress(
        tmp_path, model, [own, everything], epochs=1, steps_per_epoch=9, clustering=chosen
    )
    with pytest.raises(ValueError, match="'u' is unsharded and the optimizer does not hold its"):
        TrainingProgress(
            tmp_path,
            model,
            halves,
            epochs=1,
            steps_per_epoch=9,
            clustering={"optimizer": halves[0]},
        )


@pytest.mark.parametrize(
    "extra",
    [
        {"steps_per_epoch": 0},
        {"steps_per_epoch": "x"},
        {"epochs": 1.5},
        {"schedulers": {"a": 1}},
        {"schedulers": None},
        {"schedulers": [1]},
    ],
    ids=str,
)
def test_a_checkpoint_of_another_form_is_refused_before_it_is_loaded(extra, tmp_path):
    model, dense = build("unsharded", 0)
    save_checkpoint(tmp_path, model, step=7, optimizers=[dense], extra=extra)
    model, dense = build("unsharded", 1)
    before = outputs(model)
    (name,) = extra
    with pytest.raises(ValueError, match=f"its extra has {name} .*, which no TrainingProgress has"):
        TrainingProgress(tmp_path, model, [dense], epochs=2, steps_per_epoch=10)
    assert_same_outputs(model, before)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"epochs": 4}, r"20 steps (2 epochs of 10), and has 40 (4 of 10)"),
        ({"steps_per_epoch": 20}, "20 steps (2 epochs of 10), and has 40 (2 of 20)"),
        ({"epochs": 1, "steps_per_epoch": 15}, "20 steps (2 epochs of 10), and has 15 (1 of 15)"),
        ({}, ""),
        ({"epochs": 4, "steps_per_epoch": 5}, ""),  # as long as before
        ({"epochs": 0}, ""),
    ],
    ids=str,
)
@pytest.mark.parametrize("scheduled", [True, False])
def test_schedulers_of_a_job_of_another_length_are_told_of(
    scheduled, changed, told, tmp_path, caplog
):
    def made(**options):
        model, dense = build("unsharded", 0)
        steps = [LinearLR(dense, 1.0, 0.0, 20), StepLR(dense, 9)] if scheduled else []
        numbers = {"epochs": 2, "steps_per_epoch": 10, "schedule": NEVER} | options
        return TrainingProgress(tmp_path, model, [dense], steps, **numbers)

    progress = made()
    progress.step = 5
    progress.save()
    with caplog.at_level(logging.WARNING):
        made(**changed)
    lines = [one for one in caplog.messages if "schedulers ['LinearLR', 'StepLR'] go on" in one]
    assert len(lines) == bool(told and scheduled)
    assert all(told in line for line in lines)


def test_a_folder_that_is_one_checkpoint_is_refused(tmp_path):
    """A job in it would begin anew, and save inside of it."""
    saved_at(tmp_path, 5)
    model, dense = build("unsharded", 1)
    one = latest_checkpoint(tmp_path)
    for call in (
        lambda: job(one),
        lambda: save_checkpoint(one, model, step=1),
        lambda: latest_checkpoint(one),
    ):
        with pytest.raises(ValueError, match=f"{one} is one checkpoint, and no folder of a job"):
            call()
    load_checkpoint(one, model, optimizers=[dense])
    assert job(one, epochs=0)[1].step == 5  # an evaluation saves nothing
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [one.name]
