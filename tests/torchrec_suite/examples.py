"""Stands in for the parts of hypothesis that TorchRec's tests use, and runs example by example.

Hypothesis ends a test at its first failure, and may choose other examples each time. Here both
sides of a comparison run the same ones, and each has its own outcome.
"""

from __future__ import annotations

import functools
import itertools
import os
import random
import signal
import traceback
import unittest
from collections.abc import Callable, Iterator
from typing import Any

from tests.torchrec_suite import strategies
from tests.torchrec_suite.recording import record

__all__ = ["Phase", "Verbosity", "assume", "given", "settings", "strategies"]


class Verbosity:
    """Read by TorchRec's tests, and not used."""

    verbose = normal = quiet = None


class Phase:
    """Read by TorchRec's tests, and not used."""

    explicit = reuse = generate = target = shrink = None


class UnsatisfiedAssumption(Exception):
    """The example is none of this test."""


def assume(condition: bool) -> bool:
    """Leaves the example out where `condition` does not hold."""
    if not condition:
        raise UnsatisfiedAssumption
    return True


class settings:  # hypothesis calls it so
    """A decorator without effect."""

    phases = ()

    def __init__(self, *_: Any, **__: Any) -> None:
        """Takes what hypothesis does."""

    def __call__(self, test: Callable[..., None]) -> Callable[..., None]:
        """The test as it is."""
        return test


def _examples(values: dict[str, list[Any]], name: str) -> Iterator[dict[str, Any]]:
    every = [
        dict(zip(values, choice, strict=True)) for choice in itertools.product(*values.values())
    ]
    random.Random(name).shuffle(every)
    yield from every


def _out_of_time(*_: Any) -> None:
    raise TimeoutError("the example took too long")


def _outcome(test: Callable[..., None], case: unittest.TestCase, example: dict[str, Any]) -> str:
    """What `record` takes for the outcome of an example: "passed" or the traceback."""
    signal.signal(signal.SIGALRM, _out_of_time)
    signal.alarm(int(os.environ.get("CCE_SUITE_TIMEOUT", "120")))
    try:
        test(case, **example)
    except (UnsatisfiedAssumption, unittest.SkipTest):
        raise
    except Exception:
        return traceback.format_exc()
    finally:
        signal.alarm(0)
    return "passed"


def given(**values: list[Any]) -> Callable[[Callable], Callable]:
    """A decorator that runs a test for CCE_SUITE_EXAMPLES examples, 0 for all that there are."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def run(case: unittest.TestCase) -> None:
            most = int(os.environ.get("CCE_SUITE_EXAMPLES", "0"))
            failed = tried = 0
            for example in _examples(values, test.__qualname__):
                try:
                    outcome = _outcome(test, case, example)
                except UnsatisfiedAssumption:
                    continue
                tried += 1
                failed += outcome != "passed"
                record(case.id(), outcome, example)
                if tried == most:
                    break
            if failed:
                raise AssertionError(f"{failed} of {tried} examples failed")

        # Or pytest would take the arguments for fixtures.
        del run.__wrapped__
        return run

    return decorate
