"""Tests that need an optional package skip where it is absent, and say so."""

import importlib.util
from importlib.metadata import version

import pytest


def installed(module):
    """Whether `module` can be imported."""
    return importlib.util.find_spec(module) is not None


def needs(module):
    """The mark of a test that needs `module`."""
    return pytest.mark.skipif(not installed(module), reason=f"{module} is not installed")


def interpreter_fault():
    """Why Triton's interpreter cannot run the kernels here, or None."""
    if not installed("triton"):
        return "triton is not installed"
    found = {name: tuple(map(int, version(name).split(".")[:2])) for name in ("triton", "numpy")}
    if found["triton"] < (3, 7) and found["numpy"] >= (2, 5):
        return (
            "Triton before 3.7 does not interpret loops with NumPy 2.5, which makes no int of [1]"
        )
    return None


needs_interpreter = pytest.mark.skipif(
    interpreter_fault() is not None, reason=interpreter_fault() or ""
)
