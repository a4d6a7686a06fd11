"""What a part of the benchmark is: cells that are computed once, and what is said of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

Record = dict[str, Any]


class Cell(Protocol):
    """One measurement, which a process of its own can be given."""

    @property
    def key(self) -> str:
        """Everything that changes the result, as one line."""

    def measure(self) -> Record:
        """What is found."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of the benchmark."""

    name: str
    """On the command line, and of the file of its cells."""
    title: str
    cells: Callable[[bool], Sequence[Cell]]
    """All cells, or those of `--quick`."""
    lines: Callable[[Sequence[Record]], list[str]]
    """Markdown that says what the finished cells show."""
    draw: Callable[[Sequence[Record], Path], None]
    """Writes a plot of them to a PNG."""
