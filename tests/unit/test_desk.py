"""Runs the desk check (tests/desk): one test here for each of its files."""

import re
from pathlib import Path

import pytest

from tests.support.optional import needs_interpreter

pytestmark = needs_interpreter

FILES = sorted(path.stem for path in Path(__file__).parents[1].glob("desk/test_*.py"))
BESIDE = {
    f"desk: {name}": [
        "-m",
        "pytest",
        "-q",
        "--tb=short",
        "-p",
        "no:cacheprovider",
        "--show-capture=no",
        f"tests/desk/{name}.py",
    ]
    for name in FILES
}


@pytest.mark.parametrize("beside_name", BESIDE)
def test_desk(beside, beside_name):
    status, said = beside.end_of(beside_name)
    assert status == 0, said[-5000:]
    assert re.search(r"^[1-9]\d* passed", said, re.MULTILINE), said[-5000:]
