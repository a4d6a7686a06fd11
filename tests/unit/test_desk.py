"""Runs the desk check (tests/desk): one test here for each of its files.

Triton decides when it is imported whether it interprets kernels, so the check has processes of
its own: three, which share two cores more evenly than two.
"""

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.optional import needs_interpreter

pytestmark = needs_interpreter

ROOT = Path(__file__).parents[2]
FILES = sorted(path.stem for path in (ROOT / "tests/desk").glob("test_*.py"))


PROCESSES = 3


def started(files, report):
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"),
            *("--show-capture=no", f"--junitxml={report}"),
            *(f"tests/desk/{name}.py" for name in files),
        ],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """Whether all went well, what pytest said, and per file (tests run, texts of failures)."""
    folder = tmp_path_factory.mktemp("desk")
    reports = [folder / f"{i}.xml" for i in range(PROCESSES)]
    running = [started(FILES[i::PROCESSES], report) for i, report in enumerate(reports)]
    try:
        said = "\n".join(process.communicate(timeout=600)[0][-5000:] for process in running)
    finally:
        for process in running:
            process.kill()
    found = {name: (0, []) for name in FILES}
    for report in reports:
        for case in ElementTree.parse(report).iter("testcase") if report.exists() else ():
            name = next((n for n in FILES if n in case.get("classname").split(".")), None)
            faults = [
                f"{case.get('name')}\n{f.text}" for f in case if f.tag in ("failure", "error")
            ]
            if name is not None:
                found[name] = (found[name][0] + 1, found[name][1] + faults)
    return all(process.returncode == 0 for process in running), said, found


@pytest.mark.parametrize("file", FILES)
def test_desk(desk, file):
    _, said, found = desk
    number, faults = found[file]
    assert not faults, "\n\n".join(faults)
    assert number, f"tests/desk/{file}.py did not run:\n{said}"


def test_nothing_else_went_wrong(desk):
    """Such as an error of collection, or a crash."""
    well, said, found = desk
    assert well or any(faults for _, faults in found.values()), said
