"""Programs that tests run on several ranks: with torchrun, or without its costs."""

import os
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import wait
from pathlib import Path

from tests.support.ranks import GRACE, environment_of, free_port, rank_context

LIMIT = 300.0
"""Seconds that a program may take."""


def torchrun(ranks, *program):
    """How `program` (a file or -m MODULE, and its options) ended on this many ranks."""
    # A port of its own: torchrun's default may be taken by another test run.
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    command = [sys.executable, *launch, "--master-port", str(free_port()), *map(str, program)]
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)


def _rank(main, argv, environment, streams):
    """A process that torchrun would have started, as far as `main` can tell."""
    for number, path in streams.items():
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.update(environment)
    main(argv)


def forked(ranks, main, *argv):
    """As `torchrun` of a program whose function `main` is called with its options.

    Processes are forked from one that has imported what they need: to start torchrun and an
    interpreter for each rank takes longer than the small runs of tests.
    """
    argv = [str(word) for word in argv]
    with tempfile.TemporaryDirectory() as folder:
        streams = {number: Path(folder) / str(number) for number in (1, 2)}
        port, context = free_port(), rank_context()
        processes = []
        for rank in range(ranks):
            # Of now, as the server has that of when it was started.
            environment = {**os.environ, **environment_of(rank, ranks, port)}
            arguments = (main, argv, environment, streams)
            processes.append(context.Process(target=_rank, args=arguments))
            processes[-1].start()
        _wait(processes)
        code = next((p.exitcode for p in processes if p.exitcode), 0)
        said = [path.read_text() if path.exists() else "" for path in streams.values()]
    return subprocess.CompletedProcess([main, *argv], code, *said)


def _wait(processes):
    """Until all have ended; once one has failed, the others have not long."""
    running = {process.sentinel: process for process in processes}
    until = time.monotonic() + LIMIT
    while running and (ended := wait(list(running), max(0.0, until - time.monotonic()))):
        for sentinel in ended:
            process = running.pop(sentinel)
            process.join()
            if process.exitcode:
                until = min(until, time.monotonic() + GRACE)
    for process in running.values():
        process.kill()
        process.join()
