"""Which columns of a table are what, and how its rows become examples."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

IDS = ("auto", "vocabulary", "hash")
CRITEO_COLUMNS = (
    "label",
    *(f"I{i}" for i in range(1, 14)),
    *(f"C{i}" for i in range(1, 27)),
)
"""The columns of Criteo's files, which have no header, as the field calls them."""


@dataclass(frozen=True, kw_only=True)
class TableOptions:
    """What `TableDataset` reads of a table in files.

    Raises:
        ValueError: naming the columns or the number, and what is allowed.
    """

    label: str
    """Of 0 and 1."""
    dense: tuple[str, ...] = ()
    """Columns of numbers."""
    categorical: tuple[str, ...] = ()
    """Columns of integers or of text, an id a row."""
    sequences: tuple[str, ...] = ()
    """Columns of lists of integers or of text: features with any number of ids a row."""
    ids: str = "auto"
    """What ids are: "auto" takes integers as they are and text by a vocabulary, "vocabulary" takes
    both by a vocabulary, and "hash" hashes both."""
    hash_size: int = 1_000_000
    """Ids of each feature where they are hashed."""
    compressed: tuple[str, ...] = ()
    """Features whose tables a compression method replaces; by default those of 1,000 or more."""
    validation: str | None = None
    """A file or folder of the same columns whose rows validate; by default a fraction does."""
    validation_fraction: float = 0.1
    split_seed: int = 0
    """Of the rows that validate."""
    shuffle_rows: int = 524_288
    """Rows that a rank holds in memory to shuffle them; 1 takes rows of a piece in their order."""
    log_dense: bool = False
    """Dense values become log(1 + max(x, 0)), missing ones 0; otherwise they are standardised."""
    text_columns: tuple[str, ...] = ()
    """Columns of text files that have no header."""
    folder: str | Path | None = None
    """Where the vocabulary and the counts are kept and found again; by default nowhere."""
    resumes: bool = False
    """A vocabulary of other data in `folder` is refused, as of a run that goes on, not replaced."""

    earlier: str | Path | None = None
    """A folder with the vocabulary of an earlier run: its ids keep their numbers, new ones follow,
    and dense columns are standardised as they were there."""

    def __post_init__(self) -> None:
        if not self.features:
            raise ValueError(
                "no categorical column and no sequence: embeddings are of ids; name a column"
            )
        twice = [name for name, n in Counter(self.columns).items() if n > 1]
        if twice:
            raise ValueError(f"columns {twice} are named twice; a column is one thing alone")
        unknown = [name for name in self.compressed if name not in self.features]
        if unknown:
            raise ValueError(
                f"compressed columns {unknown} are no features, which are {list(self.features)}"
            )
        if self.ids not in IDS:
            raise ValueError(f"ids={self.ids!r}; choose one of {', '.join(IDS)}")
        if not 0 < self.validation_fraction < 1:
            raise ValueError(
                f"validation_fraction {self.validation_fraction} is not between 0 and 1, where "
                "both parts have rows; give for example 0.1, or a file of rows that validate"
            )
        for name, least in (("hash_size", 2), ("shuffle_rows", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} {getattr(self, name)} must be {least} or more")

    @property
    def features(self) -> tuple[str, ...]:
        """Columns of ids: those with one a row, then the sequences."""
        return self.categorical + self.sequences

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns that are read."""
        return (self.label, *self.dense, *self.features)
