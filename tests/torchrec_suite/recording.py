"""Writes the outcome of each test and example of a run, a JSON object a line (a pytest plugin)."""

from __future__ import annotations

import json
import os
import re
from typing import Any

import pytest

_WITH_EXAMPLES: set[str] = set()


def record(test: str, outcome: str, example: dict[str, Any] | None = None) -> None:
    """Adds a line.

    Args:
        test: its name, module.class.test.
        outcome: "passed", "skipped", or a traceback.
        example: the arguments that it was run with.
    """
    name = test
    if example is not None:
        _WITH_EXAMPLES.add(test)
        name += "[" + ", ".join(f"{key}={value}" for key, value in example.items()) + "]"
    name = re.sub(r" at 0x[0-9a-f]+", "", name)  # of functions, and of one process alone
    line = json.dumps({"test": name, "outcome": outcome})
    with open(os.environ["CCE_SUITE_RECORD"], "a") as file:
        file.write(line + "\n")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Records tests without examples."""
    if report.when != "call" and report.outcome == "passed":
        return
    path, _, rest = report.nodeid.partition("::")
    module = path.removesuffix(".py").replace("/", ".")
    test = ".".join([module.rpartition(".")[2], *rest.split("::")])
    if any(test.endswith(".".join(known.rsplit(".", 3)[1:])) for known in _WITH_EXAMPLES):
        return
    record(test, report.outcome if report.outcome != "failed" else report.longreprtext)
