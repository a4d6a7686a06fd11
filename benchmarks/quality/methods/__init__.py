"""The methods by the names of the table."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from benchmarks.quality.embedder import Embedder, Tables
from benchmarks.quality.methods.cafe import CAFE
from benchmarks.quality.methods.clustered import as_published, frequent_recipe, ours, rare_recipe
from benchmarks.quality.methods.deep_hash import DHE
from benchmarks.quality.methods.differentiable_pq import DifferentiablePQ
from benchmarks.quality.methods.hash_embeddings import HashEmbeddings
from benchmarks.quality.methods.hashed import FullTables, HashedRows
from benchmarks.quality.methods.low_rank import LowRank
from benchmarks.quality.methods.product_quantization import ProductQuantized
from benchmarks.quality.methods.quotient_remainder import QuotientRemainder
from benchmarks.quality.methods.robe import Robe
from benchmarks.quality.methods.shared import built, shared
from benchmarks.quality.methods.tensor_train import TTRec


@dataclass(frozen=True)
class Try:
    """Rates, ascending, of one optimizer and one form of a method."""

    optimizer: str
    rates: tuple[float, ...]
    form: str = ""
    least_dim: int = 0
    """Of embeddings, below which it is not tried."""


ROW_TRIES = (Try("adagrad", (0.03, 0.1, 0.3)),)
"""A state for every value: better than one a row for every method where bytes are few."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method as the benchmark runs it."""

    name: str
    build: Callable[[Tables], Embedder]
    version: int = 1
    """To be raised by whoever changes what the method computes: its cells are then run again."""
    holds_full: bool = False
    """Whether training holds the full table: where that can be, such methods win."""
    own_tries: tuple[Try, ...] = ROW_TRIES
    shares: bool = True
    """Whether it has one table for all, but where the network multiplies two embeddings.

    Where it was measured, that was as good or better for all but those that have it not.
    """
    any_budget: bool = True
    """False for full tables, which have one size."""

    def tries(self, model: str, dim: int) -> tuple[Try, ...]:
        """Of all, the best one on the split for tuning is taken; by the model above the tables."""
        fitting = tuple(tried for tried in self.own_tries if tried.least_dim <= dim)
        if not self.shares or model == "gmf":
            return fitting
        return tuple(replace(tried, form=shared(tried.form)) for tried in fitting)

    def embedder(self, tables: Tables) -> Embedder:
        """The compressed form of `tables`, of the form that they say."""
        return built(self.build, tables)


ADAM_TRIES = (Try("adam", (0.001, 0.003, 0.01)),)
OWN_TRIES = (*ADAM_TRIES, Try("adagrad", (0.01, 0.03, 0.1)))
"""Of methods that are modules of their own: rates of either optimizer."""


EIGHT_CHUNKS = (replace(ROW_TRIES[0], form="8 chunks", least_dim=32),)
"""Rows of 4 values at least, the narrowest that FBGEMM's kernels read."""


def tries_of(forms: tuple[str, ...], tries: tuple[Try, ...] = ROW_TRIES) -> tuple[Try, ...]:
    """Every one of `tries` in every one of `forms`."""
    return tuple(replace(tried, form=form) for form in forms for tried in tries)


def _restartable(
    name: str,
    build: Callable[..., Embedder],
    tries: tuple[Try, ...] = ROW_TRIES,
    version: int = 1,
    **kwargs: Any,
) -> list[Method]:
    """The method as it is, and restarted."""
    return [
        Method(
            name=f"{name} restarted" if restarts else name,
            build=partial(build, restarts=restarts, **kwargs),
            own_tries=tries,
            version=version + restarts,
        )
        for restarts in (False, True)
    ]


METHODS = {
    method.name: method
    for method in [
        Method(
            name="full",
            build=FullTables,
            holds_full=True,
            own_tries=(
                Try("rowwise_adagrad", (0.01, 0.03, 0.1)),
                Try("adagrad", (0.01, 0.03, 0.1)),
            ),
            shares=False,
            any_budget=False,
        ),
        *_restartable("hash", HashedRows, num_chunks=1),
        *_restartable("CE", HashedRows, (*ROW_TRIES, *EIGHT_CHUNKS), num_chunks=4),
        *_restartable("QR", QuotientRemainder),
        *_restartable("hash embeddings", HashEmbeddings, tries_of(("weights=0.1", "weights=0.8"))),
        *_restartable("ROBE", Robe, tries_of(("Z=1", "Z=4")), version=2),
        *_restartable("CAFE", CAFE, tries_of(("hot=0.3", "hot=0.7"))),
        Method(
            name="CCE, as published",
            build=as_published,
            own_tries=(
                Try("adamw", (0.001, 0.003, 0.01), "4 chunks"),
                *tries_of(("4 chunks", "2 chunks")),
                *EIGHT_CHUNKS,
            ),
        ),
        Method(
            name="CCE, frequent recipe",
            build=frequent_recipe,
            version=2,
            own_tries=(*tries_of(("4 chunks", "2 chunks")), *EIGHT_CHUNKS),
        ),
        Method(
            name="CCE, rare recipe",
            build=rare_recipe,
            version=2,
            own_tries=tries_of(("4 chunks, 2 rows", "4 chunks, 16 rows")),
        ),
        Method(name="ours", build=ours, version=5, shares=False),
        Method(
            name="DHE", build=DHE, own_tries=tries_of(("1024", "wide"), ADAM_TRIES), shares=False
        ),
        Method(name="TT-Rec", build=TTRec, own_tries=OWN_TRIES),
        Method(name="low rank", build=LowRank, own_tries=OWN_TRIES, shares=False),
        Method(
            name="DPQ",
            build=partial(DifferentiablePQ, tail_share=1.0),
            holds_full=True,
            own_tries=ADAM_TRIES,
            shares=False,
        ),
        Method(
            name="MGQE",
            build=partial(DifferentiablePQ, tail_share=0.25),
            holds_full=True,
            own_tries=ADAM_TRIES,
            shares=False,
        ),
        Method(name="product quantisation", build=ProductQuantized, holds_full=True, shares=False),
    ]
}


def known(name: str, names: list[str], what: str) -> str:
    """`name`, if it is one of `names`.

    Raises:
        ValueError: with the nearest known one.
    """
    if name in names:
        return name
    near = [other for other in names if other.startswith(name)]
    near = near or difflib.get_close_matches(name, names, n=1, cutoff=0.3)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    raise ValueError(f"unknown {what} {name!r}; {hint}choose from: {', '.join(map(repr, names))}")
