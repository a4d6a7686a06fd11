"""The vocabulary of a table and what else a scan found, kept in one file beside the run."""

from __future__ import annotations

import contextlib
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cce_torchrec.collectives import reason
from cce_torchrec.data.earlier import EarlierScan
from cce_torchrec.data.numbering import Numbering, PlainIds, Vocabulary, numbering_of
from cce_torchrec.data.scan import Scan
from cce_torchrec.data.table_files import TableFiles
from cce_torchrec.signed import is_as_written, signed

FILE = "vocabulary.parquet"
_ENTRY = b"cce_torchrec"
_FORM = 1
"""Another one where keys or pieces are made otherwise, whose ids are others."""
_SCHEMA = pa.schema([("column", pa.string()), ("key", pa.int64()), ("id", pa.int64())])


def about(tables: list[TableFiles], earlier: EarlierScan | None = None) -> dict[str, Any]:
    """All that a scan depends on, as plain values."""
    options = tables[0].options
    # Left out where there is none, as it is in files that were written before.
    after = {} if earlier is None else {"earlier": earlier.print()}
    return after | {
        "form": _FORM,
        "files": [table.prints() for table in tables],
        "pieces": [len(table.pieces) for table in tables],
        "label": options.label,
        "dense": list(options.dense),
        "features": tables[0].text,
        "ids": options.ids,
        "hash_size": options.hash_size,
        "split": [[table.held_out for table in tables], options.split_seed],
    }


def write_scan(folder: Path, scan: Scan, told: dict[str, Any]) -> None:
    """Keeps a scan of what `about` told: the file is there as a whole, or as it was.

    Raises:
        ValueError: naming the file, if it cannot be written.
    """
    parts = [_SCHEMA.empty_table()]
    for name, numbering in zip(told["features"], scan.numberings, strict=True):
        if isinstance(numbering, Vocabulary):
            size = len(numbering.keys)
            columns = [pa.repeat(name, size), numbering.keys, numbering.all_numbers()]
            parts.append(pa.table(columns, schema=_SCHEMA))
    entry: dict[str, Any] = {
        "about": told,
        "train": scan.train,
        "validation": scan.validation,
        "mean": scan.mean,
        "deviation": scan.deviation,
        "largest": [getattr(numbering, "largest", None) for numbering in scan.numberings],
    }
    table = pa.concat_tables(parts)
    entry["keys_crc32"] = _keys_crc(table)
    table = table.replace_schema_metadata({_ENTRY: json.dumps(signed(entry))})
    # Renamed into place, as a kill may stop a write anywhere but no rename halfway.
    beside = folder / f".{FILE}.new"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with beside.open("wb") as file:
            pq.write_table(table, file)
        beside.rename(folder / FILE)
    except Exception as error:  # clients of object stores have errors that are no OSError
        with contextlib.suppress(Exception):  # a disk that is full would keep a part of it
            beside.unlink(missing_ok=True)
        raise ValueError(f"{folder / FILE} cannot be written ({error})") from error


def read_scan(tables: list[TableFiles], folder: Path, told: dict[str, Any]) -> list[Scan]:
    """The scan that is kept in `folder`, or none, where there is none of these data.

    Raises:
        ValueError: naming the file: it cannot be read, or it is of other data and a run goes on.
    """
    file = folder / FILE
    if not file.exists():
        return []
    with _damage_named(file):
        table, entry = _read(file)
        scans = _scans(tables, table, entry, told) if entry["about"] == told else []
    if entry["about"] != told:
        # Named with both values, as the user may not know which of the options has changed.
        other = [name for name, value in told.items() if entry["about"].get(name) != value]
        if tables[0].options.resumes:
            differ = "; ".join(f"{n} were {entry['about'].get(n)}, are {told[n]}" for n in other)
            raise ValueError(
                f"{file} is of other data ({differ}), and ids would be others; resume with the "
                "same files and options, or start anew in another folder"
            )
    return scans


def _keys_crc(table: pa.Table) -> int:
    """CRC-32 of all rows, in whatever pieces they are."""
    crc = 0
    names = table["column"].cast(pa.large_binary())
    for part in pc.binary_length(names).chunks:
        crc = zlib.crc32(part.to_numpy().tobytes(), crc)
    for part in names.chunks:
        # Not as a list of texts, of which there are as many as ids.
        _, offsets, content = part.buffers()
        bounds = np.frombuffer(offsets, dtype=np.int64)[part.offset :][: len(part) + 1]
        crc = zlib.crc32(memoryview(content or b"")[bounds[0] : bounds[-1]], crc)
    for name in ("key", "id"):
        for part in table[name].chunks:
            crc = zlib.crc32(part.to_numpy().tobytes(), crc)
    return crc


def _scans(
    tables: list[TableFiles], table: pa.Table, entry: dict[str, Any], told: dict[str, Any]
) -> list[Scan]:
    """The scan that is kept in the rows and the entry of a file."""
    numberings = tables[0].numberings()
    for name, numbering, largest in zip(
        told["features"], numberings, entry["largest"], strict=True
    ):
        _fill(numbering, table, name, largest)
    found = {name: entry[name] for name in ("train", "validation", "mean", "deviation")}
    return [Scan(numberings, **found)]


def read_earlier(folder: Path) -> EarlierScan:
    """The scan that an earlier run has kept in `folder`, whatever its data were.

    Raises:
        ValueError: naming the file: it is not there, or cannot be read.
    """
    file = folder / FILE
    if not file.exists():
        raise ValueError(
            f"{folder} has no {FILE}, by which ids would keep their numbers; name the folder of a "
            "run on files (its --vocabulary, if it had one)"
        )
    numberings = {}
    with _damage_named(file):
        table, entry = _read(file)
        told = entry["about"]
        for (name, text), largest in zip(told["features"].items(), entry["largest"], strict=True):
            numberings[name] = numbering_of(told["ids"], text, told["hash_size"])
            _fill(numberings[name], table, name, largest)
        pairs = zip(entry["mean"], entry["deviation"], strict=True)
        moments = dict(zip(told["dense"], pairs, strict=True))
    return EarlierScan(file, numberings, moments)


@contextlib.contextmanager
def _damage_named(file: Path) -> Iterator[None]:
    """Raises whatever a damaged file leads to as a ValueError that names it."""
    try:
        yield
    except Exception as error:
        why = " ".join(reason(error).split())  # pyarrow says some things in several lines
        raise ValueError(f"{file} cannot be read ({why}); remove it to have it made") from error


def _read(file: Path) -> tuple[pa.Table, dict[str, Any]]:
    """The keys, and what else was kept."""
    if not file.is_file():  # to read a pipe would not end
        raise ValueError("it is no file")
    with file.open("rb") as stream:
        table = pq.read_table(stream)
    entry = json.loads(table.schema.metadata[_ENTRY])
    # Parquet has no checksums of its own that all readers look at, and other keys are other ids.
    # Files of older versions have none.
    if "keys_crc32" in entry and not (
        is_as_written(entry, needed=True) and entry["keys_crc32"] == _keys_crc(table)
    ):
        raise ValueError("its checksum differs")
    if not isinstance(entry["about"], dict):
        raise ValueError("it does not say what it is of")
    return table, entry


def _fill(numbering: Numbering, table: pa.Table, name: str, largest: int | None) -> None:
    """Has a numbering be as it was kept."""
    if isinstance(numbering, Vocabulary):
        own = table.filter(pc.equal(table["column"], name))
        numbering.keys, numbers = own["key"].to_numpy(), own["id"].to_numpy()
        # Kept only where they tell something: they are as large as the keys.
        plain = np.array_equal(numbers, np.arange(1, len(numbers) + 1))
        numbering.numbers = None if plain else numbers
    elif isinstance(numbering, PlainIds) and largest is not None:
        numbering.largest = largest
