"""Runs the desk check (tests/desk): one test here for each of its files.

Triton decides when it is imported whether it interprets kernels, so the check has a process of
its own.
"""

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

pytest.importorskip("triton", reason="triton is not installed")

ROOT = Path(__file__).parents[2]
FILES = sorted(path.stem for path in (ROOT / "tests/desk").glob("test_*.py"))


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """What pytest said, and per file (tests run, texts of failures)."""
    report = tmp_path_factory.mktemp("desk") / "report.xml"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"),
            *("tests/desk", f"--junitxml={report}"),
        ],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    said = done.stdout[-5000:] + done.stderr[-2000:]
    found = {name: (0, []) for name in FILES}
    for case in ElementTree.parse(report).iter("testcase") if report.exists() else ():
        name = next((n for n in FILES if n in case.get("classname").split(".")), None)
        faults = [f"{case.get('name')}\n{f.text}" for f in case if f.tag in ("failure", "error")]
        if name is not None:
            found[name] = (found[name][0] + 1, found[name][1] + faults)
    return done.returncode, said, found


@pytest.mark.parametrize("file", FILES)
def test_desk(desk, file):
    _, said, found = desk
    number, faults = found[file]
    assert not faults, "\n\n".join(faults)
    assert number, f"tests/desk/{file}.py did not run:\n{said}"


def test_nothing_else_went_wrong(desk):
    """Such as an error of collection, or a crash."""
    code, said, found = desk
    assert code == 0 or any(faults for _, faults in found.values()), said
