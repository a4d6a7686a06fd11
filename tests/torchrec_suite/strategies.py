"""Stands in for hypothesis.strategies: each is the list of the values that it stands for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def sampled_from(values: Sequence[Any]) -> list[Any]:
    """All of `values`."""
    return list(values)


def booleans() -> list[bool]:
    """Both."""
    return [False, True]


def just(value: Any) -> list[Any]:
    """`value` alone."""
    return [value]


def integers(min_value: int, max_value: int) -> list[int]:
    """Both ends."""
    return sorted({min_value, max_value})
