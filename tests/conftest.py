"""Checks that need processes of their own start with the session, beside the tests before them.

A module names them in `BESIDE`, arguments of Python by name, and has a test with the parameter
`beside_name` for each. They run where Triton interprets kernels (tests/support/interpreting.py),
in time that nothing else wants. Where xdist runs the tests, each of its workers starts those of a
module when it comes there, and the longest files go first, so that no worker is left with one.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BY_XDIST = "PYTEST_XDIST_WORKER" in os.environ
LONGEST = [
    "test_desk", "test_inputs", "test_train", "test_triton", "test_checkpoint",
    "test_gpu_benchmark",
]  # fmt: skip
"""Files that take about a minute or more, the longest first."""


class Beside:
    """The checks: how each ended, and what it said."""

    def __init__(self):
        # A worker of xdist has nothing else to do than to wait for them.
        workers, self._command = (1, []) if BY_XDIST else (2, ["nice", "-n", "19"])
        self._pool = ThreadPoolExecutor(max_workers=workers)
        self._own = threading.local()
        self._ends, self._processes = {}, []

    def start(self, name, arguments):
        if name not in self._ends:
            self._ends[name] = self._pool.submit(self._run, arguments)

    def _interpreting(self):
        """The process in which the checks of this thread run, one after the other."""
        if not hasattr(self._own, "process"):
            self._own.process = subprocess.Popen(
                [*self._command, sys.executable, "-m", "tests.support.interpreting"],
                cwd=ROOT,
                env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            self._processes.append(self._own.process)
        return self._own.process

    def _run(self, arguments):
        process = self._interpreting()
        with tempfile.NamedTemporaryFile(mode="r") as said:
            process.stdin.write(json.dumps([arguments, said.name]) + "\n")
            process.stdin.flush()
            return int(process.stdout.readline()), said.read()

    def end_of(self, name):
        """Exit status and output of a check, which is waited for."""
        return self._ends[name].result(timeout=600)

    def stop(self):
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with the check that it has forked
            process.wait()


BESIDE = Beside()


def pytest_collection_modifyitems(items):
    if BY_XDIST:
        places = {name: place for place, name in enumerate(LONGEST)}
        items.sort(key=lambda item: places.get(item.path.stem, len(places)))


def start(items):
    for item in items:
        checks = getattr(item.module, "BESIDE", {})
        name = getattr(item, "callspec", None) and item.callspec.params.get("beside_name")
        if name in checks and not any(mark.args[0] for mark in item.iter_markers("skipif")):
            BESIDE.start(name, checks[name])


def pytest_collection_finish(session):
    if not session.config.option.collectonly and not BY_XDIST:
        start(session.items)


def pytest_sessionfinish():
    BESIDE.stop()


@pytest.fixture
def beside(request):
    """The checks of all modules; those of the test's own have been started."""
    start(item for item in request.session.items if item.module is request.module)
    return BESIDE


@pytest.fixture(scope="module")
def rank_pool():
    """The ranks that the checks of a file share."""
    # Not above: files whose tests need no ranks are collected without torch.
    from tests.support.ranks import RankPool

    with RankPool() as pool:
        yield pool
