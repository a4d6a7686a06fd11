"""The counts of `python -m tests.house` stay where CONTRIBUTING.md wants them."""

import pytest

from tests.house import counts

LIMITS = {
    "lines of the median file": 150,
    "files over 350 lines": [],
    "functions over 40 lines, %": 3,
    "complexity over 15": [],
    "files that ask whether a table is a CCE table by isinstance": 4,
    "files that read private attributes of torch, TorchRec and FBGEMM": 1,
    "star-tuples": 0,
    "functions of more than three like-typed positional arguments": [],
    "asserts of the form `is not None`": 8,
    "public names without a docstring": [],
}
COUNTS = counts()


@pytest.mark.parametrize("what", LIMITS)
def test_at_most(what):
    assert COUNTS[what] <= LIMITS[what]


def test_reasons_are_given():
    assert COUNTS["comments, % of lines"] >= 3
