"""The training program end to end: one and two ranks, every method, what it writes."""

import contextlib
import json
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy
import pyarrow
import pyarrow.parquet
import pytest
import torch

from cce_torchrec import ClusteringSchedule
from cce_torchrec.checkpoint import latest_checkpoint
from cce_torchrec.checkpoint.location import location
from cce_torchrec.report.clusterings import _of_all_tables
from cce_torchrec.report.page import page
from cce_torchrec.report.runs import read_runs
from cce_torchrec.train import options
from cce_torchrec.train.__main__ import main
from cce_torchrec.train.trainer import Trainer
from tests.support.ranks import on_ranks
from tests.support.run_folder import lines_of, untimed
from tests.support.s3 import make_bucket, needs_s3, s3_server
from tests.support.torchrun import forked, torchrun

KEYS = {
    "val_log_loss", "val_auc", "best_val_log_loss", "best_val_auc", "parameters", "table_bytes",
    "compression_ratio", "examples_per_second", "clustering_seconds", "settings", "versions",
}  # fmt: skip


# What the program leaves behind, as the interpreter is about to end.
THREADS_AT_THE_END = """
import sys
from pathlib import Path
from cce_torchrec.train.__main__ import main
from cce_torchrec.train.trainer import Trainer

def fails(*_):
    raise ValueError("failed on purpose")

if sys.argv[-1] == "--no-pipeline":
    Trainer._end_epoch = fails
try:
    main()
except SystemExit as end:
    print(end)
threads = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
print("threads at the end:", *threads, flush=True)
"""


def threads_at_the_end(argv):
    sys.argv[1:] = argv
    exec(THREADS_AT_THE_END, {})


USUAL = ("--epochs", "2", "--dataset", "synthetic", "--batch-size", "8192")
PROGRAM = ("-m", "cce_torchrec.train")


def train(out, *options, ranks=1, check=True, start=forked, program=(main,)):
    """A run with `options`; most need no torchrun, which starts as many interpreters more."""
    done = start(ranks, *program, "--out", out, *USUAL, *options)
    if not check:
        return done
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads((out / "summary.json").read_text())
    assert summary.keys() >= KEYS
    epochs = lines_of(out, "epoch")
    assert [e["epoch"] for e in epochs] == [1, 2]
    assert summary["best_val_log_loss"] == min(e["val_log_loss"] for e in epochs)
    return summary


@pytest.mark.parametrize("plan", ["tw", "cw"])
def test_cce_on_two_ranks(tmp_path, plan):
    options = ["--plan", plan, "--compression", "40", "--clusterings", "4", "--recipe", "frequent"]
    if plan == "cw":
        summary = train(tmp_path, *options, "--finalize", ranks=2)
    else:
        summary = train(tmp_path, *options, ranks=2, start=torchrun, program=PROGRAM)
    # 4 tables of 20,000 ids: 125 main and 375 helper rows of 16 floats, 4 codes an id of 8 bits,
    # of 10 once main has 500 rows.
    assert summary["parameters"] == 4 * 500 * 16
    assert summary["table_bytes"] == 4 * (500 * 16 * 4 + 20_000 * (5 if plan == "cw" else 4))
    assert summary["clustering_seconds"] > 0
    assert summary["world_size"] == 2


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads Linux's list of threads")
@pytest.mark.parametrize("fails", [False, True])
def test_no_thread_outlives_the_process_group(tmp_path, fails):
    if fails:
        options, how = ["--no-pipeline"], dict(program=[threads_at_the_end])
    else:  # the interpreter ends too, which threads of gloo would abort
        program = tmp_path / "program.py"
        program.write_text(THREADS_AT_THE_END)
        options = ["--async-checkpoints", "--checkpoint-every", "20"]
        how = dict(start=torchrun, program=[program])
    options = ["--epochs", "1", "--clusterings", "1", *options]
    done = train(tmp_path, *options, ranks=2, check=False, **how)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("threads at the end:") == 2
    assert done.stderr.count("Error: failed on purpose") == 2 * fails
    assert "gloo" not in "".join(line for line in done.stdout.splitlines() if "threads" in line)


def test_resumed_on_fewer_ranks(tmp_path):
    """Half an epoch on two ranks, the rest on one: the loss of the epoch is that of one run."""
    whole, options = tmp_path / "whole", ["--clusterings", "0", "--seed", "3"]
    train(whole, *options, ranks=2)
    parts = tmp_path / "parts"
    train(parts, *options, "--checkpoint-every", "30", ranks=2)
    saved = sorted((parts / "checkpoints").glob("step-*"))
    assert [int(path.name[5:14]) for path in saved] == [30, 42]  # and the end, of 2 x 21
    shutil.rmtree(saved[1])  # as if killed after the first
    train(parts, *options, "--resume")
    losses = [[line["train_loss"] for line in lines_of(out, "epoch")] for out in (whole, parts)]
    assert losses[0] == pytest.approx(losses[1], rel=0.01)
    done = train(parts, *options, "--resume", "--epochs", "3", check=False)
    assert "--epochs was 2 and is 3; resume with the same options" in done.stderr


@needs_s3
def test_a_run_in_an_object_store_is_resumed():
    options = ["--clusterings", "2", "--checkpoint-every", "30"]
    with s3_server():
        make_bucket("train")
        out = location("s3://train/run")
        train(out, *options, "--async-checkpoints", ranks=2)
        assert [line["step"] for line in lines_of(out, "checkpoint")] == [30, 42]
        saved = sorted((out / "checkpoints").iterdir(), key=str)
        assert [path.name for path in saved] == ["step-000000030-0001", "step-000000042-0002"]
        (saved[1] / "manifest.json").unlink()  # as if killed after the first
        done = train(out, *options, "--resume", ranks=2, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        assert f"resumed after step 30 from {saved[0]}" in done.stdout
        assert latest_checkpoint(f"{out}/checkpoints").name == "step-000000042-0003"


def test_resumed_under_another_pipeline(tmp_path):
    """Batches that a pipeline had read ahead are trained on after all: the losses are the same."""
    options = ["--clusterings", "3", "--compression", "40", "--joint", "all"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(whole, *options, "--pipeline", "none", ranks=2)
    train(parts, *options, "--pipeline", "sparse-dist", "--checkpoint-every", "15", ranks=2)
    saved = sorted((parts / "checkpoints").glob("step-*"))
    assert [int(path.name[5:14]) for path in saved] == [30, 42]
    shutil.rmtree(saved[1])  # as if killed after the first
    train(parts, *options, "--pipeline", "none", "--resume", ranks=2)
    for kind in ("epoch", "validation", "clustering"):
        assert untimed(whole, kind) == untimed(parts, kind), kind


def test_without_torchrun_beside_another_program(tmp_path):
    """Which has the port that torch.distributed takes by default."""
    command = [sys.executable, "-m", "cce_torchrec.train", "--out", str(tmp_path)]
    options = ["--epochs", "1", "--dataset", "synthetic", "--batch-size", "90000"]
    with socket.socket() as other:
        with contextlib.suppress(OSError):  # taken already: as good
            other.bind(("", 29500))
            other.listen()
        done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "summary.json").exists()


def test_hash_on_one_rank(tmp_path):
    summary = train(tmp_path, "--method", "hash", "--compression", "40")
    assert summary["table_bytes"] == 4 * 500 * 16 * 4
    assert summary["settings"]["clusterings"] == 0
    assert summary["settings"]["lr"] == 0.1


def test_bad_options_end_with_one_sentence(tmp_path):
    done = train(tmp_path, "--embedding-dim", "30", "--joint", "no", check=False)
    assert done.returncode != 0
    assert "Error: table 'feature_0': embedding_dim 30 is not divisible" in done.stderr
    assert not list(tmp_path.iterdir())
    done = train(tmp_path, "--batch-size", "1", ranks=2, check=False)
    assert "Error: --batch-size 1 is global; give each of 2 ranks" in done.stderr
    done = train(tmp_path, "--pipeline", "prefetch", check=False)
    assert "Error: --pipeline prefetch fills caches on a CUDA device" in done.stderr


def test_a_finalized_run_resumes(tmp_path):
    options = ("--compression", "40", "--finalize", "--checkpoint-every", "20")
    options += ("--recipe", "frequent")  # rare tables are left as they are
    before = train(tmp_path, *options)  # 42 steps; finalized after step 38, saved after step 40
    after = train(tmp_path, *options, "--resume")
    assert before["table_bytes"] == 4 * (500 * 16 * 4 + 20_000 * 5)  # 500 rows: 10 bits
    for key in ("table_bytes", "val_log_loss", "best_val_auc"):
        assert after[key] == before[key], key


@on_ranks(1)
def test_rare_ids_are_clustered_less_often_than_frequent_ones(rank, world_size):
    device, steps = torch.device("cpu"), {}
    for recipe in ("rare", "frequent"):
        made = Trainer(
            options.parse(["--epochs", "3", "--compression", "40", "--recipe", recipe]), device
        )
        steps[recipe] = sorted(made.schedule.steps)
        assert made.args.lr == {"rare": 0.1, "frequent": 0.03}[recipe]
        assert steps[recipe][-1] <= 0.8 * 3 * made.steps
    assert {recipe: len(own) for recipe, own in steps.items()} == {"rare": 4, "frequent": 12}


def test_tables_of_rare_and_of_frequent_ids_are_clustered_each_in_their_time(tmp_path):
    draw = numpy.random.default_rng(0)
    columns = {"item": 1000, "shop": 50}  # 6 and 115 rows an id
    ids = {name: draw.integers(0, count, 6400) for name, count in columns.items()}
    data, out = tmp_path / "clicks.parquet", tmp_path / "out"
    clicks = (ids["item"] + ids["shop"]) % 2
    pyarrow.parquet.write_table(pyarrow.table({**ids, "click": clicks}), data)
    options = ("--dataset", "table", "--data", data, "--label", "click", "--categorical",
               "item,shop", "--compressed", "item,shop", "--compression", "4", "--epochs", "2",
               "--batch-size", "512")  # fmt: skip
    done = forked(1, main, "--out", out, *options)
    assert done.returncode == 0, done.stderr[-3000:]
    by_step = {
        line["step"]: {chunk["table"].rpartition(".")[2] for chunk in line["chunks"]}
        for line in lines_of(out, "clustering")
    }
    steps = json.loads((out / "run.json").read_text())["steps_per_epoch"]
    rare = ClusteringSchedule.for_training(2, steps, rare=True).steps
    frequent = ClusteringSchedule.for_training(2, steps).steps
    assert {step for step, tables in by_step.items() if "item" in tables} == rare
    assert {step for step, tables in by_step.items() if "shop" in tables} == frequent
    assert "; of tables of rare ids 2 in " in done.stderr
    summary = json.loads((out / "summary.json").read_text())
    found = {chunk["table"].rpartition(".")[2] for chunk in summary["last_clustering"]}
    assert found == {"item", "shop"}
    # The page has each table's last one, and sums that do not jump.
    (run,) = read_runs([out])
    lines = {line["step"]: line for line in lines_of(out, "clustering")}
    sums = dict(_of_all_tables(run, "objective_after"))
    first, second = sorted(by_step)[:3][1:]  # of shop, then of item
    expected = lines[first]["objective_after"] + lines[second]["objective_after"]
    assert sums.keys() == lines.keys() and sums[second] == pytest.approx(expected)
    text = page([run])
    for table, step in (("item", max(rare)), ("shop", max(frequent))):
        assert re.search(rf"{table}</th><td[^>]*>{step}</td>", text), table
