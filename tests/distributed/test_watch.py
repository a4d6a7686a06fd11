"""What a run of the training program tells: lines, run.json, scalars, a trace, how it failed."""

import json
import os
import shutil
import signal
import sys

import pytest
import torch

from cce_torchrec import metrics
from cce_torchrec.train import options
from cce_torchrec.train.__main__ import main
from cce_torchrec.train.meter import TrainMeter
from cce_torchrec.train.trainer import Trainer
from cce_torchrec.train.validation import Predictions
from tests.support.ranks import on_ranks
from tests.support.run_folder import lines_of, untimed
from tests.support.torchrun import forked

SMALL = ("--dataset", "synthetic", "--batch-size", "8192", "--epochs", "1", "--clusterings", "2",
         "--compression", "40")  # fmt: skip
"""21 steps of 90,000 examples to train on for two features, with clusterings after steps 9, 19."""
KINDS = ("train", "validation", "clustering", "checkpoint", "epoch")
TABLE = {
    "name", "kind", "features", "num_embeddings", "embedding_dim", "num_chunks", "num_rows",
    "num_helper_rows", "code_bits", "recipe", "codebook_bytes", "code_bytes", "optimizer_bytes",
    "full_bytes", "sharding", "ranks",
}  # fmt: skip


def ran(out, *options, ranks=2, start=main):
    return forked(ranks, start, "--out", out, *SMALL, *options)


def test_a_run_tells_all_and_is_resumed_as_if_it_had_not_stopped(tmp_path):
    pytest.importorskip("tensorboard")
    out, plain = tmp_path / "run", tmp_path / "plain"
    watched = ["--log-every", "4", "--validate-every", "6", "--checkpoint-every", "10",
               "--tensorboard", "--pipeline", "sparse-dist"]  # fmt: skip
    done = ran(out, *watched, "--profile", "2")
    assert done.returncode == 0, done.stderr[-3000:]
    _check_lines(out)
    _check_run_file(out)
    for decided in ("plan auto: ", "recipe ", "clusterings: 2 in 21 steps", "learning rate",
                    "pipeline: sparse-dist", "kernels: "):  # fmt: skip
        assert done.stderr.count(f" INFO {decided}") == (1 if decided != "recipe " else 0)
    assert done.stderr.count("recipe") == 1  # one table: the features share it
    for rank in (0, 1):
        trace = (out / "profile" / f"rank-{rank}.json").read_text()
        assert "## cce expand ##" in trace or "## cce lookup" in trace
    before = {kind: untimed(out, kind) for kind in KINDS}
    saved = sorted((out / "checkpoints").glob("step-*"))
    assert [path.name[:14] for path in saved] == ["step-000000020", "step-000000021"]
    shutil.rmtree(saved[-1])  # as if killed after step 20
    done = ran(out, *watched, "--resume")
    assert done.returncode == 0, done.stderr[-3000:]
    for kind in KINDS:
        assert untimed(out, kind) == before[kind], kind
    scalars = _scalars(out / "tensorboard")
    assert len(scalars["train/loss"]) == len(before["train"])  # none twice
    assert {"validation/auc", "clustering/objective_after", "train/memory/1"} <= scalars.keys()
    assert any(name.startswith("clustering/") and name.endswith("/changed") for name in scalars)
    # Nothing of it changes what is trained.
    done = ran(plain, "--pipeline", "none", "--log-level", "error")
    assert done.returncode == 0 and "INFO" not in done.stderr
    assert untimed(plain) == untimed(out)


def _check_lines(out):
    train, steps = lines_of(out, "train"), []
    for line in train:
        steps.append(line["step"])
        assert line.keys() == {
            "kind", "step", "epoch", "examples", "loss", "auc", "examples_per_second",
            "examples_per_second_per_rank", "rates", "memory", "seconds",
        }  # fmt: skip
        assert len(line["examples_per_second_per_rank"]) == len(line["memory"]) == 2
        assert all(used > 1e7 for used in line["memory"])  # an interpreter with torch
    assert steps == [4, 8, 10, 12, 16, 20, 21]  # also before a checkpoint, and at the end
    assert sum(line["examples"] for line in train) == 21 * 8192
    assert train[-1]["rates"] == {"tables": 0.1, "network": 0.001}
    (epoch,) = lines_of(out, "epoch")
    mean = sum(line["loss"] * line["examples"] for line in train) / (21 * 8192)
    assert epoch["train_loss"] == pytest.approx(mean, rel=1e-5)
    validations = lines_of(out, "validation")
    assert [line["step"] for line in validations] == [6, 12, 18, 21]
    assert validations[-1]["auc"] == epoch["val_auc"]
    clusterings = lines_of(out, "clustering")
    assert [line["step"] for line in clusterings] == [9, 19]
    assert 0 < clusterings[0]["changed"] < 1 and clusterings[0]["imbalance"] >= 1
    assert clusterings[0]["chunks"][0].keys() == {
        "table", "chunk", "ids", "objective_before", "objective_after", "changed",
        "empty_clusters", "dead_rows", "imbalance", "seconds",
    }  # fmt: skip
    saved = lines_of(out, "checkpoint")
    assert [line["step"] for line in saved] == [10, 20, 21]
    assert all(line["bytes"] > 1000 and line["seconds"] > 0 for line in saved)


def _check_run_file(out):
    run = json.loads((out / "run.json").read_text())
    assert (run["state"], run["error"], run["world_size"]) == ("finished", None, 2)
    assert run["ended"] >= run["started"] > 1.7e9
    assert (run["epochs"], run["steps_per_epoch"], run["clustering_steps"]) == (1, 21, [9, 19])
    for table in run["tables"]:
        assert table.keys() == TABLE and table["kind"] == "CCE" and table["ranks"]


def _scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder))
    found.Reload()
    return {name: found.Scalars(name) for name in found.Tags()["scalars"]}


def fails_on_rank_1(argv):
    def fails(self):
        if self.step == 3 and self.rank == 1:
            raise RuntimeError("no luck\non this rank")

    Trainer._cluster = fails
    main(argv)


def fails_without_memory(argv):
    def fails(self):
        raise torch.OutOfMemoryError("no memory")

    Trainer._cluster = fails
    main(argv)


def is_asked_to_end(argv):
    Trainer._cluster = lambda self: os.kill(os.getpid(), signal.SIGTERM)
    main(argv)


@pytest.mark.parametrize(
    ("start", "ranks", "said"),
    [
        (fails_on_rank_1, 2, "rank 1: no luck on this rank"),
        (fails_without_memory, 1, "no memory"),
        (is_asked_to_end, 1, "it was asked to end (by a signal)"),
    ],
)
def test_a_run_that_fails_says_so(tmp_path, start, ranks, said):
    assert ran(tmp_path, ranks=ranks, start=start).returncode != 0
    run = json.loads((tmp_path / "run.json").read_text())
    assert (run["state"], run["error"]) == ("failed", said)
    assert run["ended"] >= run["started"]


def killed(argv):
    Trainer._cluster = lambda self: os.kill(os.getpid(), signal.SIGKILL)
    main(argv)


def test_a_run_that_is_killed_is_said_to_run(tmp_path):
    ran(tmp_path, ranks=1, start=killed)
    run = json.loads((tmp_path / "run.json").read_text())
    assert (run["state"], run["ended"]) == ("running", None)
    before = (tmp_path / "run.json").read_bytes()
    assert ran(tmp_path, "--seed", "5", ranks=1).returncode != 0  # another configuration's folder
    assert (tmp_path / "run.json").read_bytes() == before


@on_ranks(1)
def test_as_many_rows_validate_as_are_asked_for(rank, world_size):
    words = ["--dataset", "synthetic", "--batch-size", "1000", "--validate-rows", "1500"]
    assert Trainer(options.parse(words), torch.device("cpu"))._evaluate().examples == 2000


def test_tensorboard_is_asked_for_before_anything_starts(tmp_path):
    done = ran(tmp_path, "--tensorboard", ranks=1, start=without_tensorboard)
    assert "Error: --tensorboard needs tensorboard, which is not installed" in done.stderr
    assert not list(tmp_path.iterdir())


def without_tensorboard(argv):
    sys.modules["tensorboard"] = None
    main(argv)


def outputs(rank, seed, rows):
    g = torch.Generator().manual_seed(100 * rank + seed)
    logits = torch.randn(rows, generator=g) * 2
    labels = (torch.rand(rows, generator=g) < logits.sigmoid()).float()
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels)
    return loss, logits, labels


@on_ranks(1, 2)
def test_a_line_is_the_mean_of_all_examples_since_the_last(rank, world_size):
    meter = TrainMeter(torch.device("cpu"))
    assert meter.empty
    for first in (0, 400):
        for seed in range(first, first + 300):  # more than are folded at once
            meter.add(outputs(rank, seed, 5 + rank))
        line = meter.line()
        every = [outputs(r, s, 5 + r) for s in range(first, first + 300) for r in range(world_size)]
        logits, labels = (torch.cat([own[i] for own in every]) for i in (1, 2))
        assert line["examples"] == len(labels)
        assert line["loss"] == pytest.approx(metrics.log_loss(logits, labels), rel=1e-6)
        assert line["auc"] == pytest.approx(metrics.auc(logits, labels), abs=1e-4)
    assert meter.empty
    meter.add((torch.tensor(float("nan")), torch.full((3,), float("nan")), torch.ones(3)))
    line = meter.line()
    assert line["loss"] != line["loss"] and line["auc"] != line["auc"]


@on_ranks(1, 2)
@pytest.mark.parametrize("room", [10**6, 500])
def test_a_validation_is_exact_while_rows_fit(rank, world_size, room):
    parts = [outputs(rank, seed, 40 + rank)[1:] for seed in range(20)]
    with torch.device("meta"):  # as with a GPU as the default device
        predictions = Predictions(exact_rows=room)
        for logits, labels in parts:
            predictions.add(logits, labels)
        found = predictions.score()
    every = [outputs(r, s, 40 + r)[1:] for s in range(20) for r in range(world_size)]
    logits, labels = (torch.cat(part) for part in zip(*every, strict=True))
    assert found.examples == len(labels)
    assert found.log_loss == pytest.approx(metrics.log_loss(logits, labels), rel=1e-12)
    exact = metrics.auc(logits, labels)
    if room == 500:
        histogram = torch.zeros(2 * metrics.BINS, dtype=torch.int64)
        metrics.add_logits(histogram, logits, labels)
        binned, most = metrics.histogram_auc(histogram)
        assert found.auc == binned and abs(binned - exact) <= most < 1e-3
    else:
        assert found.auc == exact


@on_ranks(2)
def test_a_validation_of_no_rows_is_no_number(rank, world_size):
    found = Predictions().score()
    assert found.examples == 0 and found.log_loss != found.log_loss
