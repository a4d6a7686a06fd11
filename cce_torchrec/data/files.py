"""The files of a table, cut into pieces that are read one by one, on any rank."""

from __future__ import annotations

import difflib
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

PIECE_ROWS = 8_192
"""Rows of a piece of parquet, at least. Pieces are read in random order: small ones mix better."""
BLOCK_ROWS = 32_768
"""Rows of a piece that are in memory at a time, besides those that are being shuffled."""
_CHECKED_BYTES = 65_536


@dataclass(frozen=True)
class Piece:
    """A part of a file that can be read by itself: some of its row groups, or of its bytes."""

    file: str
    number: int
    """Among all pieces of the table. With a row's place in the piece it tells rows apart."""
    start: int
    stop: int


class Format(ABC):
    """How files of a kind are read."""

    @abstractmethod
    def columns(self, file: str) -> dict[str, pa.DataType]:
        """The columns of a file with their types."""

    @abstractmethod
    def cuts(self, file: str) -> list[int]:
        """Where pieces of a file start, and its end; one number alone where it has no rows."""

    @abstractmethod
    def blocks(self, piece: Piece, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """The rows of a piece, at most about BLOCK_ROWS at a time."""

    @abstractmethod
    def rows_before(self, piece: Piece) -> int:
        """Rows of the file in front of the piece, which messages count."""


def files_of(path: str | Path, suffixes: Sequence[str]) -> list[str]:
    """The file `path`, or those in the folder `path` whose names end in `suffixes`, sorted.

    Raises:
        ValueError: there is none, or files of two kinds.
    """
    given = Path(path)
    if not str(path).strip():  # which would be the folder that the process is in
        raise ValueError("the path of the data is empty; give a file, or a folder of files")
    if not given.exists():
        raise ValueError(f"{given} does not exist; give a file, or a folder of files")
    if given.is_file():
        return [str(given)]
    if not given.is_dir():
        raise ValueError(f"{given} is neither a file nor a folder; give one of files on a disk")
    # As Spark and pyarrow do, which write files of their own beside the data under such names.
    inside = [f for f in sorted(given.rglob("*")) if f.is_file() and f.name[0] not in "._"]
    found = [f for f in inside if not suffixes or f.suffix in suffixes]
    if not found:
        names = ", ".join(f.name for f in inside[:5]) or "nothing"
        wanted = ", ".join(f"*{suffix}" for suffix in suffixes) or "file"
        raise ValueError(f"the folder {given} has no {wanted}; it holds {names}")
    return [str(file) for file in found]


def require(columns: Sequence[str], there: Sequence[str], file: str) -> None:
    """Refuses a file that lacks one of `columns`.

    Raises:
        ValueError: naming what is missing, what there is, and what comes nearest.
    """
    missing = [name for name in columns if name not in there]
    if missing:
        # Most are of another case or number.
        lower = {name.lower(): name for name in there}
        near = {n: difflib.get_close_matches(n.lower(), lower, 1, 0.4) for n in missing}
        meant = ", ".join(f"{lower[m[0]]!r} for {name!r}" for name, m in near.items() if m)
        shown = [name[:40] for name in there[:50]] + ["..."] * (len(there) > 50)
        raise ValueError(
            f"{file} lacks columns {missing}; it has {shown}"
            + (f"; nearest: {meant}" if meant else "")
        )


def refuse_doubles(file: str, names: Sequence[str]) -> None:
    """Raises ValueError where several columns of `file` have one name."""
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise ValueError(f"{file} has more than one column of the names {twice}; rename them")


def print_of(file: str) -> list[int | str]:
    """Name, size and a checksum of both ends of a file, by which a change of it is noticed."""
    path = Path(file)
    size = path.stat().st_size
    with path.open("rb") as stream:
        crc = zlib.crc32(stream.read(_CHECKED_BYTES))
        stream.seek(max(0, size - _CHECKED_BYTES))  # parquet has its statistics there
        crc = zlib.crc32(stream.read(), crc)
    return [path.name, size, crc]
