"""A job with the lines of docs/adopt_program.md: it is killed, goes on, and is evaluated."""

import json
import os
import re
import signal
from difflib import SequenceMatcher
from functools import partial
from pathlib import Path

import pytest
from safetensors.torch import load_file

import cce_torchrec
from cce_torchrec import TrainingProgress, checkpoint_info, latest_checkpoint
from tests.support import adopted_job, plain_job
from tests.support.torchrun import forked

PAGE = Path(__file__).parents[2] / "docs" / "adopt_program.md"
# 16 steps, of which 14 cluster and the 14th finalizes; the second rank has two batches more.
OPTIONS = ("--epochs", "2", "--batches", "8", "--more_batches", "2", "--adagrad")


def run(argv):
    """The adopted job, which saves every so many steps and kills itself after one of them, or 0."""
    save_every, kill_after, *options = argv
    advance = TrainingProgress.advance

    def dies(self):
        advance(self)
        if self.step == int(kill_after):
            os.kill(os.getpid(), signal.SIGKILL)

    TrainingProgress.advance = dies
    cce_torchrec.TrainingProgress = partial(TrainingProgress, save_every=int(save_every))
    adopted_job.main(options)


def start(folder, *options, save_every=5, kill_after=0):
    """How a run in `folder` ends."""
    return forked(2, run, save_every, kill_after, "--save_dir", folder, *OPTIONS, *options)


def state(folder):
    """What the latest checkpoint has: bytes of all tensors by name, and torch's random state."""
    path, found = latest_checkpoint(folder), {}
    for rank in (0, 1):
        tensors = load_file(path / f"rank-{rank}.safetensors")
        found[rank] = {name: value.numpy().tobytes() for name, value in tensors.items()}
        # The job seeds no other generator, and each start of Python has another seed.
        found[rank]["random"] = json.loads((path / f"rank-{rank}.json").read_text())["torch"]
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that was not killed, and what it said."""
    folder = tmp_path_factory.mktemp("whole")
    done = start(folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done.stdout


def test_every_rank_takes_as_many_steps_and_the_last_clustering_finalizes(whole):
    folder, said = whole
    assert re.findall(r"steps (\d+)", said) == ["8", "8"]
    info = checkpoint_info(folder)
    assert (info.step, info.schedule.final) == (16, 14)
    assert info.finalized == ["tables.item", "tables.user"]


@pytest.mark.parametrize(
    ("save_every", "kill_after", "saved", "finalized"),
    [
        (3, 5, 3, False),  # inside the first epoch
        (13, 15, 13, False),  # finalized, and not saved since
        (14, 15, 14, True),  # saved as it was finalized
    ],
)
def test_a_killed_job_ends_bit_equal(save_every, kill_after, saved, finalized, whole, tmp_path):
    died = start(tmp_path, save_every=save_every, kill_after=kill_after)
    assert died.returncode == -signal.SIGKILL, died.stderr[-3000:]
    info = checkpoint_info(tmp_path)
    assert (info.step, bool(info.finalized)) == (saved, finalized)
    done = start(tmp_path, save_every=save_every)
    assert done.returncode == 0, done.stderr[-3000:]
    left = 16 - saved
    assert re.findall(r"steps (\d+)", done.stdout) == ["8"] * (1 + (left > 8))
    found, expected = state(tmp_path), state(whole[0])
    for rank in (0, 1):
        assert found[rank].keys() == expected[rank].keys()
        assert [n for n in expected[rank] if found[rank][n] != expected[rank][n]] == []


@pytest.mark.parametrize("options", [("--epochs", "2"), ("--epochs", "0")])
def test_a_job_that_has_ended_is_evaluated_and_writes_nothing(options, whole):
    folder, said = whole
    before = sorted(folder.iterdir())
    done = start(folder, *options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "epoch" not in done.stdout and sorted(folder.iterdir()) == before
    assert re.findall("AUROC .*", done.stdout) == re.findall("AUROC .*", said)[-1:]


def changed_lines():
    """Lines of the plain job that the adopted one adds or changes; both without their docstring."""
    plain, adopted = (
        Path(job.__file__).read_text().partition("import argparse")[2].splitlines()
        for job in (plain_job, adopted_job)
    )
    added, count = [], 0
    for kind, a, b, c, d in SequenceMatcher(None, plain, adopted, autojunk=False).get_opcodes():
        if kind != "equal":
            added += [line.strip() for line in adopted[c:d] if line]
            count += max(b - a, len([line for line in adopted[c:d] if line]))
            assert all(len(line) <= 100 and ";" not in line for line in adopted[c:d])
    return added, count


def test_the_page_shows_all_lines_that_change_and_counts_them():
    added, count = changed_lines()
    text = PAGE.read_text()
    shown = re.findall(r"^\+(.*)$", "\n".join(re.findall(r"```diff\n(.*?)```", text, re.S)), re.M)
    assert sorted(line.strip() for line in shown) == sorted(added)
    assert f"{count} changed lines" in text and count <= 15
