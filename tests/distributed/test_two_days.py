"""docs/pipeline: the commands of its script, on small data, from files of clicks to exports.

The script is run with a `python` that only notes how it was called; the calls are then made in
processes that have imported everything.
"""

import json
import os
import runpy
import subprocess
from pathlib import Path
from unittest import mock

import pandas as pd
import torch
from torchrec import KeyedJaggedTensor

from cce_torchrec.checkpoint import checkpoint_info
from cce_torchrec.cli.__main__ import main as command
from cce_torchrec.inference import load_inference
from cce_torchrec.train.__main__ import main as train
from tests.support.s3 import make_bucket, needs_s3, s3_server
from tests.support.torchrun import forked

FOLDER = Path(__file__).parents[2] / "docs" / "pipeline"
NOTES = """#!/bin/sh
for word in "$@"; do printf '%s\\n' "$word"; done >> "$CALLS"
echo >> "$CALLS"
"""


def calls_of_the_script(folder, store):
    """The words that follow `python` in each call."""
    programs = folder / "bin"
    programs.mkdir()
    (programs / "python").write_text(NOTES)
    (programs / "python").chmod(0o755)
    environment = os.environ | {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "CALLS": str(folder / "calls"),
        "STORE": store,
        "ROWS": "4000",
    }
    script = [FOLDER / "pipeline.sh", folder / "work"]
    subprocess.run(["bash", *map(str, script)], env=environment, check=True, capture_output=True)
    calls = (folder / "calls").read_text().removesuffix("\n\n").split("\n\n")
    return [call.split("\n") for call in calls]


def cce_torchrec(argv):
    with mock.patch("sys.argv", ["cce-torchrec", *argv]):
        command()


def call(words):
    if words[0] != "-m":
        with mock.patch("sys.argv", words):
            runpy.run_path(words[0], run_name="__main__")
        return
    module, name, *options = words[1:]
    assert module == "cce_torchrec.cli"
    ranks, main, argv = 1, cce_torchrec, [name, *options]
    if name == "train":  # which would become torchrun
        at = options.index("--nproc-per-node")
        ranks, main, argv = int(options[at + 1]), train, options[:at] + options[at + 2 :]
    done = forked(ranks, main, *argv)
    assert done.returncode == 0, done.stderr[-3000:]


@needs_s3
def test_two_days_of_a_recommender(tmp_path):
    with s3_server():
        make_bucket("days")
        calls = calls_of_the_script(tmp_path, "s3://days")
        assert [words[2] for words in calls[1:]] == ["train", "inspect", "export"] * 2
        for words in calls:
            call(words)
        days = [checkpoint_info(f"s3://days/day-{n}").tables for n in (1, 2)]
    (users, more), (items, new) = (
        [next(t for t in day.values() if t.name == name) for day in days]
        for name in ("user", "item")
    )
    assert more.num_embeddings > users.num_embeddings
    assert new.num_embeddings > items.num_embeddings
    assert (more.num_rows, more.seed) == (users.num_rows, users.seed)
    assert [len(day) for day in days] == [2, 3]
    served = [load_inference(tmp_path / "work" / "exports" / f"day-{n}") for n in (1, 2)]
    keys = [list(collection.inputs) for collection in served]
    assert keys == [["user", "item"], ["user", "item", "place"]]
    batch = KeyedJaggedTensor.from_lengths_sync(
        keys[1], torch.tensor([more.num_embeddings - 1, 5, 3]), torch.ones(3, dtype=torch.int32)
    )
    assert torch.isfinite(served[1](batch).values()).all()


def test_the_days_are_what_the_page_says(tmp_path):
    with mock.patch("sys.argv", ["make_days.py", str(tmp_path), "3000"]):
        runpy.run_path(str(FOLDER / "make_days.py"), run_name="__main__")
    one, two = (pd.read_parquet(tmp_path / f"day-{n}") for n in (1, 2))
    assert set(two) - set(one) == {"place"}
    assert two["user"].max() > one["user"].max()
    assert set(two["item"]) - set(one["item"])
    assert json.dumps(sorted(one["click"].unique().tolist())) == "[0, 1]"
