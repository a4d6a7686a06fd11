"""The methods by the names of the table."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.quality.embedder import Embedder, Tables
from benchmarks.quality.methods.hashed import FullTables, HashedRows


@dataclass(frozen=True)
class Try:
    """Rates, ascending, of one optimizer and one form of a method."""

    optimizer: str
    rates: tuple[float, ...]
    form: str = ""


ROW_TRIES = (Try("rowwise_adagrad", (0.03, 0.1, 0.3)),)


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method as the benchmark runs it."""

    name: str
    build: Callable[[Tables], Embedder]
    version: int = 1
    """To be raised by whoever changes what the method computes: its cells are then run again."""
    group: str = "compressed while it trains"
    tries: tuple[Try, ...] = ROW_TRIES
    """Of all, the best one on the split for tuning is taken."""
    any_budget: bool = True
    """False for full tables, which have one size."""


FULL_GROUP = "holds the full table while it trains"
METHODS = {
    method.name: method
    for method in [
        Method(
            name="full",
            build=FullTables,
            group=FULL_GROUP,
            tries=(Try("rowwise_adagrad", (0.01, 0.03, 0.1)),),
            any_budget=False,
        ),
        Method(name="hash", build=lambda t: HashedRows(t, num_chunks=1, restarts=False)),
        Method(name="hash restarted", build=lambda t: HashedRows(t, num_chunks=1, restarts=True)),
        Method(name="CE", build=lambda t: HashedRows(t, num_chunks=4, restarts=False)),
        Method(name="CE restarted", build=lambda t: HashedRows(t, num_chunks=4, restarts=True)),
    ]
}


def known(name: str, names: list[str], what: str) -> str:
    """`name`, if it is one of `names`.

    Raises:
        ValueError: with the nearest known one.
    """
    if name in names:
        return name
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.3)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"unknown {what} {name!r}; {hint}choose from: {', '.join(names)}")
