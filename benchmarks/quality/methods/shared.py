"""All tables as one: rows, codes and networks that a method would have for each are shared.

ROBE shares its array over tables by its nature. So that no method loses by the division of a budget
alone, each has its tables both ways, and the tuning split chooses (`SHARED` in the form).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

import torch

from benchmarks.quality.budgets import Share
from benchmarks.quality.embedder import Embedder, Tables

SHARED = "shared"
"""What the form of such a cell begins with; what follows is the form of the method itself."""


def shared(form: str) -> str:
    """`form` with shared tables."""
    return f"{SHARED}, {form}" if form else SHARED


def built(build: Callable[[Tables], Embedder], tables: Tables) -> Embedder:
    """The method that `build` makes, of one table for all where the form says so."""
    first, _, form = tables.form.partition(", ")
    if first != SHARED:
        return build(tables)
    return Joined(build, replace(tables, form=form), set(tables.names))


class Joined(Embedder):
    """A method that has one table of the ids of some `tables`, one's after another's.

    Args:
        build: makes the method.
        tables: of all.
        joined: names of those that are one; each of the others stays by itself.
    """

    def __init__(
        self, build: Callable[[Tables], Embedder], tables: Tables, joined: Collection[str]
    ) -> None:
        super().__init__(tables)
        every = range(len(tables.names))
        together = [t for t in every if tables.names[t] in joined]
        rest = [t for t in every if t not in together]
        self.parts = [(together, build(_one(_some(tables, together))))]
        if rest:
            self.parts.append((rest, build(_some(tables, rest))))

    def lookup(self, ids: torch.Tensor, training: bool) -> torch.Tensor:
        """See `Embedder`."""
        first, found = torch.tensor(self.tables.first), []
        for number, (columns, part) in enumerate(self.parts):
            sizes = torch.tensor([self.tables.sizes[t] for t in columns])
            own = ids[:, columns] - first[columns] + sizes.cumsum(0) - sizes
            # The joint table has one column, whose ids are those of all of its tables.
            own = own if number else own.reshape(-1, 1)
            vectors = part.lookup(own, training).view(len(ids), len(columns), self.tables.dim)
            found.append(vectors if number else self.in_order(vectors))
        if len(found) == 1:
            return found[0]
        order = [column for columns, _ in self.parts for column in columns]
        return torch.cat(found, dim=1)[:, torch.tensor(order).argsort()]

    def in_order(self, vectors: torch.Tensor) -> torch.Tensor:
        """Embeddings [B, features, D] of the joint table as the network gets them."""
        return vectors

    def step(self) -> None:
        """See `Embedder`."""
        for _, part in self.parts:
            part.step()

    def after(self, step: int) -> None:
        """See `Embedder`."""
        for _, part in self.parts:
            part.after(step)

    def before_evaluation(self) -> None:
        """See `Embedder`."""
        for _, part in self.parts:
            part.before_evaluation()

    def penalty(self) -> torch.Tensor | None:
        """See `Embedder`."""
        found = [own for _, part in self.parts if (own := part.penalty()) is not None]
        return torch.stack(found).sum() if found else None

    @property
    def made(self) -> str:
        """See `Embedder`."""
        (names, one), *rest = self.parts
        joined = f"{len(names)} tables as one" if len(names) > 1 else "rare ids"
        return "; ".join([f"{joined}, {one.made}".rstrip(", "), *(part.made for _, part in rest)])

    @property
    def parameters(self) -> int:
        """See `Embedder`."""
        return sum(part.parameters for _, part in self.parts)

    @property
    def stored_bytes(self) -> int:
        """See `Embedder`."""
        return sum(part.stored_bytes for _, part in self.parts)

    @property
    def training_bytes(self) -> int:
        """See `Embedder`."""
        return sum(part.training_bytes for _, part in self.parts)


def _some(tables: Tables, chosen: Sequence[int]) -> Tables:
    """`tables` of the numbers `chosen` alone."""
    return replace(
        tables,
        names=[tables.names[t] for t in chosen],
        sizes=[tables.sizes[t] for t in chosen],
        shares=[tables.shares[t] for t in chosen],
        bounds=[tables.bounds[t] for t in chosen],
        counts=[tables.counts[t] for t in chosen],
    )


def _one(tables: Tables) -> Tables:
    """One table of the ids of all `tables`."""
    pairs = zip(tables.bounds, tables.sizes, strict=True)
    return replace(
        tables,
        names=["all"],
        sizes=[tables.num_ids],
        shares=[Share(sum(s.amount for s in tables.shares), tables.shares[0].counts_bytes)],
        bounds=[sum(bound * size for bound, size in pairs) / tables.num_ids],
        counts=[torch.cat(tables.counts)],
    )
