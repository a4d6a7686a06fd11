"""Tests that need an optional package skip where it is absent, and say so."""

import importlib.util

import pytest


def installed(module):
    """Whether `module` can be imported."""
    return importlib.util.find_spec(module) is not None


def needs(module):
    """The mark of a test that needs `module`."""
    return pytest.mark.skipif(not installed(module), reason=f"{module} is not installed")
