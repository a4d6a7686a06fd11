"""Finished cells on disk: one file of JSON lines per data set, sorted by key."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Record = dict[str, Any]


_TEXTS = ("key", "dataset", "budget", "method", "version", "form")
_NUMBERS = ("passes", "split", "rate")


def fault(record: Record) -> str:
    """What keeps `record` from being a cell of the grid; "" where nothing does."""
    missing = [name for name in (*_TEXTS, *_NUMBERS) if name not in record]
    missing += ["log_loss"] * (not {"log_loss", "does_not_fit"} & set(record))
    if missing:
        return f"without {', '.join(missing)}"
    kinds = dict.fromkeys(_TEXTS, str) | dict.fromkeys(_NUMBERS, (int, float))
    # Of a run that came to no number they are null.
    kinds |= dict.fromkeys(("log_loss", "auc", "cpu_seconds"), (int, float, type(None)))
    for name, kind in kinds.items():
        if name in record and not isinstance(record[name], kind):
            return f"{name} is {record[name]!r}"
    parts = record["key"].split("|")
    own = [record[name] for name in ("dataset", "budget", "method")]
    own += [f"passes={record['passes']}", f"split={record['split']}"]
    return "" if set(own) <= set(parts) else "the key is that of another cell"


class Store:
    """The finished cells of a folder. Runs that share it keep each other's.

    Args:
        folder: need not be there yet.
        fault: what keeps a record from being a finished cell; "" where nothing does.

    Raises:
        ValueError: naming the file and the line that is none.
    """

    def __init__(self, folder: Path, fault: Callable[[Record], str] = fault) -> None:
        self.folder, self._fault = folder, fault
        self.records: dict[str, Record] = {}
        for file in sorted(folder.glob("*.jsonl")):
            self.records |= _read(file, self._fault)

    def add(self, record: Record) -> None:
        """Keeps `record`, in memory and on disk."""
        dataset = record["dataset"]
        file = self.folder / f"{dataset}.jsonl"
        self.folder.mkdir(parents=True, exist_ok=True)
        with _locked(self.folder / f".{dataset}.lock"):
            if file.exists():
                self.records |= _read(file, self._fault)  # what another run has added since
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


def _read(file: Path, fault: Callable[[Record], str]) -> dict[str, Record]:
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} holds no finished cells ({error}); move it away") from error
    out = {}
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            wrong = fault(record) if isinstance(record, dict) else f"it is {line[:40]}"
            if wrong:
                raise ValueError(wrong)
            out[record["key"]] = record
        except ValueError as error:
            raise ValueError(
                f"{file}, line {number} is no finished cell ({error}); delete the line, and a "
                "rerun computes its cell again"
            ) from error
    return out
