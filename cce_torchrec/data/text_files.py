"""Text files of comma- or tab-separated values as pieces of bytes.

A piece has the lines that begin in its range of bytes, so that any rank can read any piece without
those in front of it, as Hadoop splits text. TorchRec's reader of Criteo's files
(`torchrec.datasets.criteo`) goes through a file line by line, in Python.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.csv

from cce_torchrec.data.files import Format, Piece, refuse_doubles

TEXT_SUFFIXES = {".csv": ",", ".tsv": "\t", ".txt": "\t"}
"""Names of text files, and what separates their values."""
_PIECE_BYTES = 1 << 20
_LINE_BYTES = 8 << 20
"""At most; a file that is no text may have no line's end at all."""


@dataclass(frozen=True)
class TextFiles(Format):
    """Text: every value is read as text, and an empty one as missing."""

    names: tuple[str, ...] = ()
    """Columns of files without a header; a file that ends in .csv has them in its first line."""

    def _separator(self, file: str) -> str:
        return TEXT_SUFFIXES.get(Path(file).suffix, "\t")

    def _header(self, file: str) -> tuple[int, list[str]]:
        """Bytes of the header, and the names of the columns."""
        if self.names and Path(file).suffix != ".csv":
            return 0, list(self.names)
        with Path(file).open("rb") as stream:
            line = stream.readline(_LINE_BYTES)
        if not line.strip():
            raise ValueError(f"{file} is empty, and has no line of names of columns")
        try:
            text = line.decode("utf-8-sig").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}: the first line is no text of UTF-8 ({error})") from error
        if "\r" in text:
            raise ValueError(
                f"{file}: lines end in a carriage return alone; write them to end in a newline"
            )
        names = next(csv.reader([text], delimiter=self._separator(file)))
        refuse_doubles(file, names)
        return len(line), names

    def columns(self, file: str) -> dict[str, pa.DataType]:
        """The columns of a file, all of text."""
        return dict.fromkeys(self._header(file)[1], pa.string())

    def cuts(self, file: str) -> list[int]:
        """Bytes about which pieces start."""
        start, size = self._header(file)[0], Path(file).stat().st_size
        return [*range(start, size, _PIECE_BYTES), size] if size > start else [start]

    def _lines(self, piece: Piece) -> bytes:
        """The lines that begin in the piece."""
        with Path(piece.file).open("rb") as stream:
            begin, _ = self._header(piece.file)
            stream.seek(max(begin, piece.start - 1))
            # A line belongs to the piece in which it begins; here may be a mere newline.
            if piece.start > begin:
                stream.readline(_LINE_BYTES)
            first = stream.tell()
            if first >= piece.stop:
                return b""
            text = stream.read(piece.stop - first)
            text = text if text.endswith(b"\n") else text + stream.readline(_LINE_BYTES)
            if not text.endswith(b"\n") and stream.read(1):
                raise ValueError(
                    f"{piece.file}: a line at byte {first} or after has more than "
                    f"{_LINE_BYTES:,} bytes; is it a table of text?"
                )
            return text

    def blocks(self, piece: Piece, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """The rows of a piece, in one block."""
        text = self._lines(piece)
        if not text.strip():
            return
        text += b"\n" * (not text.endswith(b"\n"))
        # Arrow says which row it is only to a handler, and not in its error.
        bad: list[pyarrow.csv.InvalidRow] = []
        try:
            table = self._parsed(piece, text, columns, bad)
        except pa.ArrowException as error:
            self._refuse_open_quote(piece, text)
            if not bad:
                row = self.rows_before(piece) + _first_undecodable(text)
                raise ValueError(
                    f"{piece.file}, row {row} or after: it cannot be read as UTF-8 ({error})"
                ) from error
            row = self.rows_before(piece) + (bad[0].number or 1)
            raise ValueError(
                f"{piece.file}, row {row}: {bad[0].actual_columns} values, and the table has "
                f"{bad[0].expected_columns} columns; a value must not hold a line break"
            ) from None
        rows = table.num_rows - 1
        # Otherwise quotes went on over ends of lines, and took rows for the text of a value.
        if rows != text.count(b"\n") and rows != len(_filled(text)):
            self._refuse_open_quote(piece, text)
            raise ValueError(
                f"{piece.file}, row {self.rows_before(piece) + 1} or after: {len(_filled(text))} "
                f"lines were read as {rows} rows; a value must not hold a line break"
            )
        yield from table.slice(0, rows).combine_chunks().to_batches()

    def _parsed(
        self,
        piece: Piece,
        text: bytes,
        columns: Sequence[str],
        bad: list[pyarrow.csv.InvalidRow],
    ) -> pa.Table:
        """Lines as rows, and a last one that is none of them; `bad` takes a row that is none."""
        _, names = self._header(piece.file)
        separator = self._separator(piece.file)
        # The last row is missing where a quote in front of it is not closed.
        text += b"-" + separator.encode() * (len(names) - 1) + b"\n"

        def stop(row: pyarrow.csv.InvalidRow) -> str:
            bad.append(row)
            return "error"

        return pyarrow.csv.read_csv(
            pa.BufferReader(text),
            # Whole, and by one thread, which alone counts the rows it cannot read.
            pyarrow.csv.ReadOptions(
                column_names=names, use_threads=False, block_size=len(text) + 1
            ),
            pyarrow.csv.ParseOptions(delimiter=separator, invalid_row_handler=stop),
            pyarrow.csv.ConvertOptions(
                column_types=dict.fromkeys(names, pa.string()),
                include_columns=list(columns),
                strings_can_be_null=True,
                null_values=[""],
            ),
        )

    def _refuse_open_quote(self, piece: Piece, text: bytes) -> None:
        """Raises ValueError if a quote in `text` is not closed in its line, naming the row."""
        separator = self._separator(piece.file)
        for number, line in enumerate(_filled(text), start=1):
            try:
                list(csv.reader([line.decode(errors="replace")], delimiter=separator, strict=True))
            except csv.Error as error:
                # Text behind a quote that is closed is another error here, and none to Arrow.
                if "unexpected end" in str(error):
                    row = self.rows_before(piece) + number
                    raise ValueError(
                        f"{piece.file}, row {row}: a quote is not closed in its line; close it, "
                        'double those that a value holds ("so ""quoted"" here"), and leave line '
                        "breaks out of values"
                    ) from None

    def rows_before(self, piece: Piece) -> int:
        """Lines in front of the piece that are not empty, but for the header."""
        begin, _ = self._header(piece.file)
        with Path(piece.file).open("rb") as stream:
            stream.seek(begin)
            # Counted once a row is bad, and not of every piece.
            rows = 0
            while stream.tell() < piece.start and (line := stream.readline(_LINE_BYTES)):
                rows += bool(line.strip(b"\r\n"))
        return rows


def _filled(text: bytes) -> list[bytes]:
    """The lines that are not empty."""
    return [line for line in text.split(b"\n") if line.strip(b"\r")]


def _first_undecodable(text: bytes) -> int:
    """The number, from 1, of the first line that is not UTF-8; 1 where all are."""
    for number, line in enumerate(_filled(text), start=1):
        try:
            line.decode()
        except UnicodeDecodeError:
            return number
    return 1
