"""Finished cells on disk: one file of JSON lines per data set, sorted by key."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def lacks(record: Record) -> list[str]:
    """The fields of a cell of the grid that `record` has not."""
    fields = ("key", "dataset", "passes", "budget", "method", "version", "split", "rate", "form")
    out = [name for name in fields if name not in record]
    return out + ["log_loss"] * (not {"log_loss", "does_not_fit"} & set(record))


class Store:
    """The finished cells of a folder. Runs that share it keep each other's.

    Args:
        folder: need not be there yet.
        lacks: the fields that a record is no finished cell without, of those that it has not.

    Raises:
        ValueError: naming the file and the line that is none.
    """

    def __init__(self, folder: Path, lacks: Callable[[Record], list[str]] = lacks) -> None:
        self.folder, self._lacks = folder, lacks
        self.records: dict[str, Record] = {}
        for file in sorted(folder.glob("*.jsonl")):
            self.records |= _read(file, self._lacks)

    def add(self, record: Record) -> None:
        """Keeps `record`, in memory and on disk."""
        dataset = record["dataset"]
        file = self.folder / f"{dataset}.jsonl"
        self.folder.mkdir(parents=True, exist_ok=True)
        with _locked(self.folder / f".{dataset}.lock"):
            if file.exists():
                self.records |= _read(file, self._lacks)  # what another run has added since
            self.records[record["key"]] = record
            keys = sorted(k for k, r in self.records.items() if r["dataset"] == dataset)
            # Under another name first: an interrupted run leaves the old file or the new one.
            unfinished = self.folder / f".{dataset}.unfinished"
            unfinished.write_text("".join(f"{json.dumps(self.records[k])}\n" for k in keys))
            unfinished.replace(file)


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    with file.open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _read(file: Path, lacks: Callable[[Record], list[str]]) -> dict[str, Record]:
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} holds no finished cells ({error}); move it away") from error
    out = {}
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            missing = lacks(record)
            if missing:
                raise KeyError(f"without {', '.join(missing)}")
            out[record["key"]] = record
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{file}, line {number} is no finished cell ({error}); delete the line, and a "
                "rerun computes its cell again"
            ) from error
    return out
