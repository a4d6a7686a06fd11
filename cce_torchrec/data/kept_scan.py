"""The vocabulary of a table and what else a scan found, kept in one file beside the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cce_torchrec.data.earlier import EarlierScan
from cce_torchrec.data.numbering import Numbering, PlainIds, Vocabulary, numbering_of
from cce_torchrec.data.scan import Scan
from cce_torchrec.data.table_files import TableFiles

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
    """Keeps a scan of what `about` told: the file is there as a whole, or as it was."""
    parts = [_SCHEMA.empty_table()]
    for name, numbering in zip(told["features"], scan.numberings, strict=True):
        if isinstance(numbering, Vocabulary):
            size = len(numbering.keys)
            columns = [pa.repeat(name, size), numbering.keys, numbering.all_numbers()]
            parts.append(pa.table(columns, schema=_SCHEMA))
    entry = {
        "about": told,
        "train": scan.train,
        "validation": scan.validation,
        "mean": scan.mean,
        "deviation": scan.deviation,
        "largest": [getattr(numbering, "largest", None) for numbering in scan.numberings],
    }
    table = pa.concat_tables(parts).replace_schema_metadata({_ENTRY: json.dumps(entry)})
    folder.mkdir(parents=True, exist_ok=True)
    # Renamed into place, as a kill may stop a write anywhere but no rename halfway.
    beside = folder / f".{FILE}.new"
    with beside.open("wb") as file:
        pq.write_table(table, file)
    beside.rename(folder / FILE)


def read_scan(tables: list[TableFiles], folder: Path, told: dict[str, Any]) -> list[Scan]:
    """The scan that is kept in `folder`, or none, where there is none of these data.

    Raises:
        ValueError: naming the file: it cannot be read, or it is of other data and a run goes on.
    """
    file = folder / FILE
    if not file.exists():
        return []
    table, entry = _read(file)
    if entry["about"] != told:
        # Named with both values, as the user may not know which of the options has changed.
        other = [name for name, value in told.items() if entry["about"].get(name) != value]
        if tables[0].options.resumes:
            differ = "; ".join(f"{n} were {entry['about'].get(n)}, are {told[n]}" for n in other)
            raise ValueError(
                f"{file} is of other data ({differ}), and ids would be others; resume with the "
                "same files and options, or start anew in another folder"
            )
        return []
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
    table, entry = _read(file)
    numberings = {}
    try:
        told = entry["about"]
        for (name, text), largest in zip(told["features"].items(), entry["largest"], strict=True):
            numberings[name] = numbering_of(told["ids"], text, told["hash_size"])
            _fill(numberings[name], table, name, largest)
        pairs = zip(entry["mean"], entry["deviation"], strict=True)
        moments = dict(zip(told["dense"], pairs, strict=True))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is damaged, or of another version ({error})") from error
    return EarlierScan(file, numberings, moments)


def _read(file: Path) -> tuple[pa.Table, dict[str, Any]]:
    """The keys, and what else was kept.

    Raises:
        ValueError: naming the file, if it cannot be read.
    """
    try:
        with file.open("rb") as stream:
            table = pq.read_table(stream)
        return table, json.loads(table.schema.metadata[_ENTRY])
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} cannot be read ({error}); remove it to have it made") from error


def _fill(numbering: Numbering, table: pa.Table, name: str, largest: int | None) -> None:
    """Has a numbering be as it was kept."""
    if isinstance(numbering, Vocabulary):
        own = table.filter(pc.equal(table["column"], name))
        numbering.keys, numbering.numbers = own["key"].to_numpy(), own["id"].to_numpy()
    elif isinstance(numbering, PlainIds) and largest is not None:
        numbering.largest = largest
