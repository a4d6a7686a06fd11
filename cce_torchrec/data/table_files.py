"""A table in files: they are found, their columns checked, and their rows read piece by piece."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from cce_torchrec.codes.hashing import SAMPLE_ROLE, hash_function
from cce_torchrec.data.files import Format, Piece, files_of, print_of, require
from cce_torchrec.data.numbering import Numbering, numbering_of
from cce_torchrec.data.parquet_files import ParquetFiles
from cce_torchrec.data.table_options import TableOptions
from cce_torchrec.data.text_files import TEXT_SUFFIXES, TextFiles
from cce_torchrec.data.values import (
    BadValue,
    Values,
    is_list,
    is_number,
    is_text,
    keys,
    labels,
    numbers,
)

PARQUET_SUFFIXES = (".parquet", ".pq")


@dataclass(frozen=True)
class TableFiles:
    """The files of a table, in order, and how they are read."""

    options: TableOptions
    format: Format
    files: list[str]
    pieces: list[Piece]
    text: dict[str, bool]
    """By feature, whether its ids are text; otherwise they are integers."""
    held_out: float
    """Which share of the rows validates: 0 and 1 are none and all."""

    def prints(self) -> list[list[int | str]]:
        """What tells whether the files are the same as before."""
        return [print_of(file) for file in self.files]

    def numberings(self) -> list[Numbering]:
        """How ids of each feature are numbered, before anything was seen."""
        options = self.options
        return [numbering_of(options.ids, text, options.hash_size) for text in self.text.values()]

    def values(self, piece: Piece, numberings: Sequence[Numbering]) -> Iterator[Values]:
        """The rows of a piece, block by block.

        Raises:
            ValueError: a value that its column may not have, with file, row and column.
        """
        first = 0
        for block in self.format.blocks(piece, self.options.columns):
            try:
                yield self._checked(block, numberings)
            except BadValue as bad:
                # Rows are counted now, as only bad values need their numbers.
                row = self.format.rows_before(piece) + first + bad.row + 1
                raise ValueError(f"{piece.file}, row {row}, column {bad.column!r}: {bad}") from None
            first += len(block)

    def validates(self, piece: Piece, first: int, num_rows: int) -> np.ndarray:
        """Which rows of a piece validate, from its `first` on, bool: by a hash of the place."""
        # By place and not by a draw: whoever reads the row, in whatever order, decides alike.
        places = torch.arange(first, first + num_rows) + (piece.number << 32)
        hashed = hash_function(self.options.split_seed, "validation", 0, role=SAMPLE_ROLE)
        return (hashed.bits31(places) < self.held_out * 2**31).numpy()

    def _checked(self, block: pa.RecordBatch, numberings: Sequence[Numbering]) -> Values:
        options = self.options
        dense = [numbers(block.column(name), name) for name in options.dense]
        found = [keys(self._ids(block, name), name, text=t) for name, t in self.text.items()]
        for name, key, numbering in zip(options.features, found, numberings, strict=True):
            numbering.check(key, name)
        stacked = np.stack(dense, axis=1) if dense else np.zeros((len(block), 0))
        return Values(labels(block.column(options.label), options.label), stacked, found)

    def _ids(self, block: pa.RecordBatch, name: str) -> pa.Array:
        column = block.column(name)
        if name in self.options.sequences and pa.types.is_null(column.type):
            return pa.nulls(len(column), pa.list_(pa.int64()))  # a file without any list
        return column


def open_table(path: str | Path, options: TableOptions, held_out: float) -> TableFiles:
    """The table in the file or folder `path`, of whose rows a share validates.

    Raises:
        ValueError: naming files, columns and types: there is none, or columns are missing, of a
            type that is not read, or of another type than in the first file.
    """
    files = files_of(path, () if options.text_columns else (*PARQUET_SUFFIXES, *TEXT_SUFFIXES))
    form = _format(files, options)
    text: dict[str, bool] = {}
    # All of them: a run that ends at the last file of a folder has wasted hours.
    for file in files:
        columns = form.columns(file)
        require(options.columns, list(columns), file)
        own = {name: _is_text(name, columns[name], options, file) for name in options.features}
        for name, is_one in own.items():
            if is_one is not None and text.setdefault(name, is_one) != is_one:
                kinds = {True: "text", False: "integers"}
                raise ValueError(
                    f"column {name!r} holds {kinds[is_one]} in {file} and {kinds[not is_one]} in "
                    "files before it; write all files with the same types"
                )
    ranges = [(file, cut) for file in files for cut in pairwise(form.cuts(file))]
    pieces = [Piece(file, n, *cut) for n, (file, cut) in enumerate(ranges)]
    if not pieces:
        raise ValueError(f"{path} has no rows")
    if isinstance(form, TextFiles) and options.ids == "auto":
        text = _texts_that_are_no_integers(form, pieces[0], options)
    # In order of the features; of a column without any value either would do.
    text = {name: text.get(name, False) for name in options.features}
    return TableFiles(options, form, files, pieces, text, held_out)


def _format(files: list[str], options: TableOptions) -> Format:
    suffixes = {Path(file).suffix for file in files}
    parquet = suffixes.intersection(PARQUET_SUFFIXES)
    others = sorted(suffixes - parquet)
    if parquet and others:
        raise ValueError(
            f"{Path(files[0]).parent} has files of the kinds {sorted(suffixes)}; give a folder of "
            "one kind"
        )
    unknown = [suffix for suffix in others if suffix not in TEXT_SUFFIXES]
    if unknown and not options.text_columns:
        raise ValueError(
            f"{files[0]} ends in {unknown[0]!r}, and files are read by their names: "
            f"{', '.join((*PARQUET_SUFFIXES, *TEXT_SUFFIXES))}; unpack compressed text"
        )
    return ParquetFiles() if parquet else TextFiles(options.text_columns)


def _is_text(name: str, kind: pa.DataType, options: TableOptions, file: str) -> bool | None:
    """Whether ids of a column are text and not integers; None where it has no value at all."""
    wanted = "lists of integers or of text" if name in options.sequences else "integers or text"
    found = kind
    if is_list(kind) and name in options.sequences:
        kind = kind.value_type
    elif name in options.sequences and not pa.types.is_null(kind):
        kind = pa.struct([])  # of no kind that is read
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_null(kind):
        return None
    if not (is_text(kind) or is_number(kind)):
        raise ValueError(f"{file}: column {name!r} is {found}, and {wanted} are needed")
    return is_text(kind)


def _texts_that_are_no_integers(
    form: TextFiles, piece: Piece, options: TableOptions
) -> dict[str, bool]:
    """Which columns of a text file are no integers, by its first block."""
    found = dict.fromkeys(options.features, False)
    for block in form.blocks(piece, options.features):
        for name in options.features:
            try:
                pc.cast(block.column(name), pa.int64())
            except pa.ArrowInvalid:  # Arrow's own guess would take floats and dates, too
                found[name] = True
    return found
