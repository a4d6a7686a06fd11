"""Programs that tests start with torchrun."""

import subprocess
import sys

from tests.support.ranks import free_port


def torchrun(ranks, *program):
    """How `program` (a file or -m MODULE, and its options) ended on this many ranks."""
    # A port of its own: torchrun's default may be taken by another test run.
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    command = [sys.executable, *launch, "--master-port", str(free_port()), *map(str, program)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)
