"""docs/example.py, as the documents say to run it: it learns, and ends."""

import re
from pathlib import Path

from cce_torchrec.checkpoint import latest_checkpoint
from tests.support.torchrun import torchrun

EXAMPLE = Path(__file__).parents[2] / "docs" / "example.py"


def test_the_example_learns_what_is_no_input(tmp_path):
    done = torchrun(2, EXAMPLE, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    told = re.search(r"log loss ([\d.]+), of predicting the mean ([\d.]+)", done.stdout)
    assert told, done.stdout
    trained, constant = map(float, told.groups())
    assert trained < 0.5 * constant  # 0.21 and 0.69 on CPUs
    assert latest_checkpoint(tmp_path) is not None
