"""A cell of the grid: one training run, and the key of everything that changes its result."""

from __future__ import annotations

from dataclasses import dataclass, replace

TUNING_SPLITS = (100, 10)
"""Those on which rates are chosen, or on the first of them; they are in no reported figure."""
FINAL_SPLITS = (20, 21, 22, 23)
"""Those that are reported: no recipe or schedule was chosen by them, as by 0 and 1."""
TRAINING_VERSION = 1
"""To be raised by whoever changes the training of all methods: division, networks, evaluations.

A data set and its model (`Problem`), and a method (`Method`), have versions of their own.
"""


@dataclass(frozen=True, order=True)
class Group:
    """The cells that share one choice of the rate."""

    dataset: str
    passes: int
    method: str
    version: str
    """Of the data set, and of the method (`grid.group_of`)."""
    budget: str
    """As `Budget.parse` reads it."""


@dataclass(frozen=True, order=True)
class Cell:
    """One training run. The seed is that of initial values, hashes and the order of batches."""

    group: Group
    split: int
    seed: int
    optimizer: str
    """Of the compressed tables; the network and the other tables are the same for all."""
    rate: float
    form: str = ""
    """Of the method, where it has several that are chosen from as rates are."""

    def on(self, split: int) -> Cell:
        """The same cell of another split, with the seed of that."""
        return replace(self, split=split, seed=split)

    @property
    def key(self) -> str:
        """Everything that changes the result, as one line."""
        g = self.group
        return "|".join(
            [
                g.dataset,
                f"passes={g.passes}",
                g.budget,
                g.method,
                f"split={self.split}",
                f"seed={self.seed}",
                f"{self.form} {self.optimizer}={self.rate:g}".strip(),
                "early stopping",
                f"version={TRAINING_VERSION}.{g.version}",
            ]
        )
