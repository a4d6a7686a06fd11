"""A table in parquet or text files, of any size, as examples that are streamed from the disk."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

from cce_torchrec.collectives import Ranks
from cce_torchrec.data.dataset import Bags, Dataset, Examples, Rows, Share, epoch_generator
from cce_torchrec.data.earlier import EarlierScan
from cce_torchrec.data.even import even_batches
from cce_torchrec.data.kept_scan import about, read_earlier, read_scan, write_scan
from cce_torchrec.data.numbering import MAX_PLAIN_ID, PlainIds
from cce_torchrec.data.regroup import ahead, joined, regrouped
from cce_torchrec.data.scan import Scan, scan
from cce_torchrec.data.table_files import TableFiles, open_table
from cce_torchrec.data.table_options import TableOptions
from cce_torchrec.data.values import Values

COMPRESSED_FROM = 1000
"""Ids from which on the table of a feature is compressed, unless the options say which are."""


class TableDataset(Examples):
    """The rows of a table in files, of which only those being shuffled are in memory.

    It is made on every rank, from the same files, and reads them through once: every value is
    checked, rows and ids are counted, and vocabularies are built, which `options.folder` keeps. An
    epoch takes the pieces of the files in a random order, of which each rank has a share of as many
    rows, and shuffles these within a part that is in memory. What it gives depends on the seed, the
    epoch and the number of ranks alone, and can begin at any batch.

    Raises:
        ValueError: on every rank, naming file, row, column and value: files that are not there, are
            empty or hold no such columns, or values that these may not have.
    """

    def __init__(self, path: str | Path, options: TableOptions) -> None:
        ranks = Ranks(None)
        self.name = Path(path).stem
        self.options = options
        split = 0.0 if options.validation is not None else options.validation_fraction

        # The first rank alone: storage would list folders of thousands of files for each.
        def opened() -> list[TableFiles]:
            tables = [open_table(path, options, split)]
            if options.validation is not None:
                tables.append(open_table(options.validation, options, 1.0))
                _same_kinds(*tables)
            return tables

        tables = ranks.first(opened)
        self.pieces = [(table, piece) for table in tables for piece in table.pieces]
        """What is read at a time, each with the files that it is of."""
        self._scan = _scanned(tables, ranks)
        for name, numbering in zip(options.features, self._scan.numberings, strict=True):
            if isinstance(numbering, PlainIds) and numbering.largest > MAX_PLAIN_ID:
                raise ValueError(
                    f"column {name!r} has the id {numbering.largest}, and a table would have a row "
                    "for each up to it; number them by a vocabulary, or hash them (--ids)"
                )
        sizes = [numbering.num_ids for numbering in self._scan.numberings]
        self.features = dict(zip(options.features, sizes, strict=True))
        # Smaller tables cost little, and their ids are frequent.
        large = [name for name, size in self.features.items() if size >= COMPRESSED_FROM]
        self.compressed = list(options.compressed) or large
        self._held: dict[Share, list[Rows]] = {}
        """Batches that validate, once they were read."""
        self._check_rows(path, ranks.size)

    def _check_rows(self, path: str | Path, world_size: int) -> None:
        if self.num_train < world_size or self.num_validation < 1:
            what = self.options.validation or f"a fraction of {self.options.validation_fraction}"
            remedy = "more rows" if self.options.validation else "another fraction"
            raise ValueError(
                f"{path}: {self.num_train} rows to train on for {world_size} ranks, and "
                f"{self.num_validation} that validate ({what}); each rank needs a row to train on, "
                f"and one at least has to validate: use fewer ranks, or {remedy}"
            )

    @property
    def num_train(self) -> int:
        """Examples to train on."""
        return sum(self._scan.train)

    @property
    def num_validation(self) -> int:
        """Examples that validate."""
        return sum(self._scan.validation)

    @property
    def num_dense(self) -> int:
        """Dense features; without any there is one of ones, as DLRM has a part for them."""
        return max(1, len(self.options.dense))

    def batches(self, share: Share, *, seed: int, epoch: int, done: int = 0) -> Iterator[Rows]:
        """Batches of the rows to train on, in an order of the epoch's own. Collective."""
        # Counts are equal already; what fails to be read on one rank has to raise on all.
        return even_batches(self._own_batches(share, seed=seed, epoch=epoch, done=done))

    def _own_batches(self, share: Share, *, seed: int, epoch: int, done: int) -> Iterator[Rows]:
        steps, part = (
            self.steps(share.batch_size),
            share.part(min(share.batch_size, self.num_train)),
        )
        order = torch.randperm(len(self.pieces), generator=epoch_generator(seed, epoch)).tolist()
        size = len(part)
        in_memory = max(1, self.options.shuffle_rows // max(1, size))  # batches
        # Alike: rows of a short rest would hardly be shuffled.
        in_memory = -(-steps // -(-steps // in_memory))
        first = done // in_memory
        skip = done % in_memory
        lengths = [
            size * (min(start + in_memory, steps) - start)
            for start in range(first * in_memory, steps, in_memory)
        ]
        start = steps * part.start + first * in_memory * size
        blocks = self._rows(order, self._scan.train, start)
        for n, rows in enumerate(ahead(regrouped(blocks, lengths))):
            # Of numpy, whose generators take several numbers as one seed.
            random = np.random.default_rng([seed % 2**63, epoch, share.rank, first + n])
            shuffled = torch.from_numpy(random.permutation(len(rows)))
            for index in shuffled.split(size)[skip:]:
                yield rows.take(index)
            skip = 0

    def validation_batches(self, share: Share) -> Iterator[Rows]:
        """Batches of the rows that validate, in their order. Collective."""
        whole, rest = divmod(self.num_validation, share.batch_size)
        parts = [share.part(share.batch_size)] * whole + [share.part(rest)] * (rest > 0)
        start = sum(part.start for part in parts)
        if share in self._held:
            return even_batches(iter(self._held[share]))
        rows = self._rows(range(len(self.pieces)), self._scan.validation, start)
        return even_batches(self._holding(share, regrouped(rows, map(len, parts))))

    def _holding(self, share: Share, batches: Iterator[Rows]) -> Iterator[Rows]:
        """The same batches, which stay in memory if they are no more rows than are shuffled."""
        # Where few rows validate, to read all others to find them costs more than they do.
        few = share.part(self.num_validation)
        held: list[Rows] = []
        for batch in batches:
            if len(few) <= self.options.shuffle_rows:
                held.append(batch)
            yield batch
        if held:
            self._held[share] = held

    def in_memory(self) -> Dataset:
        """All rows, in the order of the files, for programs that hold the whole of a data set."""
        every = range(len(self.pieces))
        train, validation = (
            joined(list(self._rows(every, counts, 0)))
            for counts in (self._scan.train, self._scan.validation)
        )
        return Dataset(self.name, self.features, self.compressed, train, validation)

    def _rows(self, order: Iterable[int], counts: list[int], start: int) -> Iterator[Rows]:
        """Rows that train or validate, from the `start`-th of the pieces in this order on."""
        train = counts is self._scan.train
        for n in order:
            if start >= counts[n]:
                start -= counts[n]
                continue
            table, piece = self.pieces[n]
            read = 0
            for values in table.values(piece, self._scan.numberings):
                chosen = table.validates(piece, read, len(values)) != train
                read += len(values)
                # Of a piece that another rank begins, the first rows are that rank's.
                passed = np.cumsum(chosen) <= start
                start -= int((chosen & passed).sum())
                yield self._numbered(values.select(chosen & ~passed))

    def _numbered(self, values: Values) -> Rows:
        dense = np.ones((len(values), 1))
        if self.options.log_dense:
            dense = np.log1p(np.maximum(values.dense, 0.0))
        elif self.options.dense:
            dense = (values.dense - self._scan.mean) / self._scan.deviation
        single, bags = [np.zeros((0, len(values)), dtype=np.int64)], []
        for numbering, key in zip(self._scan.numberings, values.keys, strict=True):
            ids = numbering.ids(key)
            if key.lengths is None:
                single.append(ids[None])
            else:
                bags.append(Bags(torch.from_numpy(ids), torch.from_numpy(key.lengths)))
        return Rows(
            torch.from_numpy(np.nan_to_num(dense).astype(np.float32)),
            torch.from_numpy(np.ascontiguousarray(np.concatenate(single).T)),
            torch.from_numpy(values.labels),
            tuple(bags),
        )


def _same_kinds(table: TableFiles, validation: TableFiles) -> None:
    """Refuses files to validate on whose ids are numbered otherwise."""
    other = [name for name, text in table.text.items() if validation.text[name] != text]
    if other:
        raise ValueError(
            f"columns {other} hold text in one and integers in the other of {table.files[0]} and "
            f"{validation.files[0]}; number both alike (--ids vocabulary, --ids hash)"
        )


def _scanned(tables: list[TableFiles], ranks: Ranks) -> Scan:
    """The scan that the folder keeps, or a new one, which it keeps from then on."""
    folder = tables[0].options.folder

    options, numberings = tables[0].options, tables[0].numberings()

    def kept() -> tuple[EarlierScan | None, list[Scan], dict[str, object]]:
        earlier = None if options.earlier is None else read_earlier(_path(options.earlier))
        told = about(tables, earlier)
        found = [] if folder is None else read_scan(tables, _path(folder), told)
        return earlier, found, told

    earlier, found, told = ranks.first(kept)
    if found:
        return found[0]
    if earlier is not None:
        earlier.begin(options.features, numberings)
    parts = [(table, piece) for table in tables for piece in table.pieces]
    made = scan(parts, numberings, ranks)
    if earlier is not None:
        earlier.finish(options.dense, made)
    if folder is not None:
        ranks.first(lambda: write_scan(_path(folder), made, told))
    return made


def _path(folder: str | Path) -> Path:
    return Path(folder) if isinstance(folder, str) else folder  # object stores have their own kind
