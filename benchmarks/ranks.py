"""Starts a benchmark on several ranks of this machine."""

from __future__ import annotations

import os
import subprocess
import sys


def start_ranks(module: str, num_ranks: int, port: int, *arguments: str) -> None:
    """Runs `python -m module arguments` on `num_ranks` ranks of one thread each, by torchrun.

    Raises:
        CalledProcessError: a rank failed.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run"]
    ranks = ["--nproc-per-node", str(num_ranks), "--master-port", str(port)]
    subprocess.run(
        [*launcher, *ranks, "-m", module, *arguments],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
