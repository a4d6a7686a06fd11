"""docs/example.py, as the documents say to run it: it learns, and ends."""

import re
import subprocess
import sys
from pathlib import Path

from cce_torchrec.checkpoint import latest_checkpoint
from tests.support.ranks import free_port

EXAMPLE = Path(__file__).parents[2] / "docs" / "example.py"


def test_the_example_learns_what_is_no_input(tmp_path):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        str(free_port()),
        str(EXAMPLE),
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    told = re.search(r"log loss ([\d.]+), of predicting the mean ([\d.]+)", done.stdout)
    assert told, done.stdout
    trained, constant = map(float, told.groups())
    assert trained < 0.5 * constant  # 0.23 and 0.69 on CPUs
    assert latest_checkpoint(tmp_path) is not None
