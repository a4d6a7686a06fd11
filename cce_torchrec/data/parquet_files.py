"""Parquet files as pieces of row groups."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from cce_torchrec.data.files import BLOCK_ROWS, PIECE_ROWS, Format, Piece, refuse_doubles
from cce_torchrec.reasons import first_line


def _open(file: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{file} is no parquet file that can be read ({first_line(error)})"
        ) from error


class ParquetFiles(Format):
    """Parquet: a piece has as many row groups as hold PIECE_ROWS rows, or one that has more."""

    def columns(self, file: str) -> dict[str, pa.DataType]:
        """The columns of a file with their types."""
        with _open(file) as opened:
            schema = opened.schema_arrow
        refuse_doubles(file, schema.names)
        return dict(zip(schema.names, schema.types, strict=True))

    def cuts(self, file: str) -> list[int]:
        """The row groups at which pieces start."""
        with _open(file) as opened:
            metadata = opened.metadata
        cuts, rows = [0], 0
        for group in range(metadata.num_row_groups):
            rows += metadata.row_group(group).num_rows
            if rows >= PIECE_ROWS:
                cuts.append(group + 1)
                rows = 0
        return cuts if rows == 0 else [*cuts, metadata.num_row_groups]

    def blocks(self, piece: Piece, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """The rows of a piece."""
        with _open(piece.file) as opened:
            groups = list(range(piece.start, piece.stop))
            # Page by page: a row group may be larger than memory.
            batches = opened.iter_batches(BLOCK_ROWS, row_groups=groups, columns=list(columns))
            try:
                for batch in batches:
                    yield batch.select(columns)  # parquet gives them in the file's order
            except (pa.ArrowException, OSError) as error:
                raise ValueError(f"{piece.file} cannot be read ({first_line(error)})") from error

    def rows_before(self, piece: Piece) -> int:
        """Rows of the row groups in front of the piece."""
        with _open(piece.file) as opened:
            return sum(opened.metadata.row_group(group).num_rows for group in range(piece.start))
