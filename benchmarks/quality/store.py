"""Finished cells on disk: one file of JSON lines per data set, sorted by key."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Record = dict[str, Any]


class Store:
    """The finished cells of a folder. Runs that share it keep each other's."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.records: dict[str, Record] = {}
        for file in sorted(folder.glob("*.jsonl")):
            self.records |= _read(file)

    def add(self, record: Record) -> None:
        """Keeps `record`, in memory and on disk."""
        dataset = record["dataset"]
        file = self.folder / f"{dataset}.jsonl"
        self.folder.mkdir(parents=True, exist_ok=True)
        with _locked(self.folder / f".{dataset}.lock"):
            if file.exists():
                self.records |= _read(file)  # what another run has added since
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


def _read(file: Path) -> dict[str, Record]:
    out = {}
    for number, line in enumerate(file.read_text().splitlines(), start=1):
        try:
            record = json.loads(line)
            out[record["key"]] = record
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{file}, line {number} is no finished cell ({error}); delete the line, and a "
                "rerun computes its cell again"
            ) from error
    return out
