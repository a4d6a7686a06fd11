"""Checks that need processes of their own start with the session, beside the tests before them.

A module names them in `BESIDE`, arguments of Python by name, and has a test with the parameter
`beside_name` for each. They run with TRITON_INTERPRET=1,
which Triton reads once, when it is imported; two at once, and only in time that nothing else wants.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


class Beside:
    """The checks: how each ended, and what it said."""

    def __init__(self):
        self._pool = ThreadPoolExecutor(max_workers=2)
        self._ends, self._processes = {}, []

    def start(self, name, arguments):
        if name not in self._ends:
            self._ends[name] = self._pool.submit(self._run, arguments)

    def _run(self, arguments):
        process = subprocess.Popen(
            ["nice", "-n", "19", sys.executable, *arguments],
            cwd=ROOT,
            env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._processes.append(process)
        said, _ = process.communicate()
        return process.returncode, said

    def end_of(self, name):
        """Exit status and output of a check, which is waited for."""
        return self._ends[name].result(timeout=600)

    def stop(self):
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in self._processes:
            process.kill()


BESIDE = Beside()


def pytest_collection_finish(session):
    # Where tests run in several processes, each has collected all of them: the one that comes to
    # the module starts its checks.
    if session.config.option.collectonly or "PYTEST_XDIST_WORKER" in os.environ:
        return
    for item in session.items:
        checks = getattr(item.module, "BESIDE", {})
        name = getattr(item, "callspec", None) and item.callspec.params.get("beside_name")
        if name in checks and not any(mark.args[0] for mark in item.iter_markers("skipif")):
            BESIDE.start(name, checks[name])


def pytest_sessionfinish():
    BESIDE.stop()


@pytest.fixture
def beside(request):
    """The checks of all modules."""
    for name, arguments in request.module.BESIDE.items():
        BESIDE.start(name, arguments)
    return BESIDE


@pytest.fixture(scope="module")
def rank_pool():
    """The ranks that the checks of a file share."""
    # Not above: files whose tests need no ranks are collected without torch.
    from tests.support.ranks import RankPool

    with RankPool() as pool:
        yield pool
