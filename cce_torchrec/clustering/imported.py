"""A trained full table as the codes and codebooks of a CCE table: product quantisation by chunks.

Jegou et al., "Product quantization for nearest neighbor search", TPAMI 2011. The table has the
finalized form, one codebook a chunk: a helper that is read by a hash gains nothing here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torchrec.modules.embedding_configs import data_type_to_dtype

from cce_torchrec.bars import bar
from cce_torchrec.chunk_order import first_chunks, unrotated
from cce_torchrec.codes.chunk_codes import local_codes
from cce_torchrec.codes.hashing import IMPORT_ROLE, hash_function
from cce_torchrec.config import CCEEmbeddingBagConfig
from cce_torchrec.kmeans import TensorPoints, kmeans
from cce_torchrec.kmeans.backends import make_backend
from cce_torchrec.modules.embedding_bag_collection import CCEEmbeddingBagCollection
from cce_torchrec.spans import span
from cce_torchrec.table import physical_table

_BLOCK = 1 << 16
"""Ids that are coded at once; a multiple of all groups of packed codes."""
SAMPLES_PER_CENTROID = 256


@dataclass(frozen=True, kw_only=True)
class ImportReport:
    """What became of a full table."""

    table: str
    error: float
    """Sum of squared differences over sum of squares, of all ids, weighted by counts if given."""
    table_bytes: int
    full_bytes: int

    def __str__(self) -> str:
        return (
            f"table {self.table!r}: {self.table_bytes:,} bytes for {self.full_bytes:,}, relative "
            f"squared error {self.error:.4f}"
        )


def import_table(
    collection: CCEEmbeddingBagCollection,
    table: str,
    weight: Any,
    *,
    counts: Any = None,
    iterations: int = 25,
    samples_per_centroid: int | None = SAMPLES_PER_CENTROID,
) -> ImportReport:
    """Fills a table of `collection` with a trained full table; it can be served, or trained on.

    Args:
        collection: unsharded, on a CPU.
        table: name of a CCE table with `num_helper_rows=0`.
        weight: [num_embeddings, embedding_dim], a tensor or an array; of one that numpy maps
            (`numpy.load(path, mmap_mode="r")`) a block is in memory at a time, and the sample.
        counts: how often each id occurs, integers [num_embeddings], by which errors weigh.
        iterations: of K-means, from k-means++.
        samples_per_centroid: ids that K-means sees of each chunk, for each of its rows; None: all.

    Raises:
        ValueError: a table that has another form, a weight or counts of another shape, or values
            that are not finite. Nothing is written then.

    Optimizer state of the table stays what it was: import before training starts, or clear it.
    """
    counts = None if counts is None else torch.as_tensor(counts)
    config = _checked(collection, table, weight, counts)
    if samples_per_centroid is not None and samples_per_centroid < 1:
        raise ValueError(f"samples_per_centroid {samples_per_centroid} must be 1 or more, or None")
    codes = local_codes(collection.codes, table)
    drawn = _drawn(config, samples_per_centroid)
    sample = _chunk_by_chunk(config, _rows(weight, drawn, table), drawn)
    weights = None if counts is None else counts.long()[drawn]
    if weights is not None and not bool(weights.any()):
        raise ValueError(
            f"table {table!r}: none of the ids that were drawn occurs; leave counts out"
        )
    books = []
    shown = bar(config.num_chunks, f"{table}: K-means", "chunk")
    for chunk, own in enumerate(sample.split(config.chunk_dim, dim=1)):
        with span(f"import {table}, chunk {chunk}, k-means"):
            found_rows = kmeans(
                own.contiguous(), config.num_rows, iterations, init="k-means++", weights=weights
            )
        books.append(found_rows.centroids)
        shown.update()
    shown.close()
    # As the table stores them, by which ids are coded and the error is counted.
    kind = data_type_to_dtype(config.data_type)
    books = [book.to(kind).float() for book in books]
    if not all(bool(torch.isfinite(book).all()) for book in books):
        raise ValueError(f"table {table!r}: the weight is too large for its data_type, {kind}")
    # All codes are found before any is written, as values of a later block may not be finite.
    with span(f"import {table}, codes"):
        found, error = _coded(config, weight, counts, books)
    with torch.no_grad():
        for chunk, (book, rows) in enumerate(zip(books, found, strict=True)):
            bag: Any = collection.embedding_bags[physical_table(table, chunk)]
            bag.weight.copy_(book)
            codes.write(chunk, rows)
    codes.set_clusterings(codes.num_clusterings + 1)  # by which codes are known to be learned
    return ImportReport(
        table=table, error=error, table_bytes=config.table_bytes, full_bytes=config.full_bytes
    )


def _coded(
    config: CCEEmbeddingBagConfig,
    weight: Any,
    counts: torch.Tensor | None,
    books: list[torch.Tensor],
) -> tuple[list[torch.Tensor], float]:
    """The codes int32 [ids] of each chunk, and the error of `ImportReport`."""
    ids = config.num_embeddings
    found = [torch.empty(ids, dtype=torch.int32) for _ in books]
    error = total = 0.0
    for first, embeddings in _blocks(weight, ids, config.name):
        own_ids = torch.arange(first, first + len(embeddings))
        block = _chunk_by_chunk(config, embeddings, own_ids)
        squares = torch.zeros(len(block), dtype=torch.float64)
        for chunk, own in enumerate(block.split(config.chunk_dim, dim=1)):
            nearest = _nearest(own.contiguous(), books[chunk])
            found[chunk][first : first + len(block)] = nearest
            squares += (own - books[chunk][nearest.long()]).double().square().sum(1)
        weighing = _weighing(counts, first, len(block))
        error += float((squares * weighing).sum())
        total += float((block.double().square().sum(1) * weighing).sum())
    return found, error / max(total, 1e-300)


def _checked(
    collection: CCEEmbeddingBagCollection, table: str, weight: Any, counts: torch.Tensor | None
) -> CCEEmbeddingBagConfig:
    """The table, if `weight` can be imported into it."""
    if not isinstance(collection, CCEEmbeddingBagCollection) or collection.device.type != "cpu":
        raise ValueError(
            f"table {table!r}: full tables are imported into a CCEEmbeddingBagCollection on a CPU "
            f"(of sequences, into its `bags`), and not into {type(collection).__name__}"
        )
    tables = {own.name: own for own in collection.tables}
    if table not in tables or tables[table].cce is None:
        known = [name for name, own in tables.items() if own.cce is not None]
        raise ValueError(f"no CCE table {table!r}; the collection has {known}")
    config = tables[table].compressed
    if config.helper_rows or not config.learned_codes:
        raise ValueError(
            f"table {table!r}: a full table is imported into main rows alone; configure it with "
            "num_helper_rows=0 and learned codes"
        )
    # Row i of a full table is id i, and that of a hash is of some raw id, or of several.
    if config.hash_ids:
        raise ValueError(
            f"table {table!r} hashes raw ids (hash_ids), whose rows are not those of a full table; "
            "configure it without, and number the ids as the full table does"
        )
    _check_weight(table, weight, counts, (config.num_embeddings, config.embedding_dim))
    return config


def _check_weight(
    table: str, weight: Any, counts: torch.Tensor | None, wanted: tuple[int, int]
) -> None:
    """Raises ValueError if `weight` or `counts` are not those of a table of the shape `wanted`."""
    if not hasattr(weight, "shape") or getattr(weight, "is_meta", False):
        raise ValueError(f"table {table!r}: the weight is a tensor or an array with values")
    if "complex" in str(weight.dtype):
        raise ValueError(f"table {table!r}: the weight is {weight.dtype}, and rows are real")
    if tuple(weight.shape) != wanted:
        raise ValueError(f"table {table!r} is {list(wanted)}, the weight {list(weight.shape)}")
    if counts is not None and tuple(counts.shape) != wanted[:1]:
        raise ValueError(f"table {table!r} has {wanted[0]} ids, the counts {list(counts.shape)}")
    if counts is not None and (counts.is_floating_point() or bool((counts < 0).any())):
        raise ValueError(f"table {table!r}: counts are integers of 0 or more; got {counts.dtype}")


def _drawn(config: CCEEmbeddingBagConfig, per_centroid: int | None) -> torch.Tensor:
    """The ids that K-means sees, rising: all, or those of the lowest hashes."""
    ids = torch.arange(config.num_embeddings)
    most = None if per_centroid is None else per_centroid * config.num_rows
    if most is None or most >= len(ids):
        return ids
    # By hash, so that the same ids are drawn again, wherever the weight is.
    hash_ = hash_function(config.seed, config.name, 0, role=IMPORT_ROLE)
    return hash_.bits31(ids).topk(most, largest=False).indices.sort().values


def _rows(weight: Any, ids: torch.Tensor, table: str) -> torch.Tensor:
    """Rows of the full table, float32 [ids, D]."""
    # An array that numpy maps reads what is asked for, and no more.
    at = ids if isinstance(weight, torch.Tensor) else ids.numpy()
    rows = torch.as_tensor(weight[at]).detach().float().cpu()
    if not bool(torch.isfinite(rows).all()):
        bad = int(ids[~torch.isfinite(rows).all(1)][0])
        raise ValueError(f"table {table!r}: the weight of id {bad} is NaN or infinite")
    return rows


def _chunk_by_chunk(
    config: CCEEmbeddingBagConfig, embeddings: torch.Tensor, ids: torch.Tensor
) -> torch.Tensor:
    """Embeddings [ids, D] with their chunks in the table's order, from 0 on."""
    if not config.rotate_chunks or not config.id_ranges:
        return embeddings
    starts = [own.start for own in config.id_ranges.values()]
    first = first_chunks(starts, ids, config.num_chunks)
    return unrotated(embeddings, first, config.num_chunks)


def _blocks(weight: Any, ids: int, table: str) -> Iterator[tuple[int, torch.Tensor]]:
    """The first id and the rows of each block, with a bar where a person is looking on."""
    shown = bar(ids, table, "id")
    for first in range(0, ids, _BLOCK):
        own = torch.arange(first, min(first + _BLOCK, ids))
        yield first, _rows(weight, own, table)
        shown.update(len(own))
    shown.close()


def _nearest(rows: torch.Tensor, book: torch.Tensor) -> torch.Tensor:
    """The nearest row of `book` to each of `rows`, int32."""
    # By the engine of clusterings, so that codes are those that K-means would have given.
    points = TensorPoints(rows)
    return make_backend("auto", rows.device).prepare(points, book)(0, len(rows))


def _weighing(counts: torch.Tensor | None, first: int, size: int) -> torch.Tensor:
    if counts is None:
        return torch.ones(size, dtype=torch.float64)
    return counts[first : first + size].double()


def import_curve(
    weight: Any,
    *,
    num_chunks: int = 4,
    rows: Sequence[int] = (16, 64, 256, 1024),
    most_ids: int = 100_000,
) -> list[ImportReport]:
    """What a full table [N, D] would become with so many rows a chunk, from up to `most_ids` ids.

    Bytes are those of all N ids; errors are of the ids that were looked at, evenly spread.
    """
    given = list(getattr(weight, "shape", ()))
    if len(given) != 2 or not given[0] or most_ids < 1:
        raise ValueError(
            f"the weight is {given}, most_ids {most_ids}; give [ids, embedding_dim], and 1 or more"
        )
    ids, dim = weight.shape
    # Evenly spread, as neighbouring ids may be alike.
    step = -(-ids // most_ids)
    sample = _rows(weight, torch.arange(0, ids, step), "full")
    out = []
    for count in rows:
        shape = {"embedding_dim": dim, "num_chunks": num_chunks, "num_rows": count}
        of_sample, of_all = (
            CCEEmbeddingBagConfig(name="full", num_embeddings=n, num_helper_rows=0, **shape)
            for n in (len(sample), ids)
        )
        report = import_table(CCEEmbeddingBagCollection([of_sample]), "full", sample)
        out.append(
            ImportReport(
                table=f"{count} rows",
                error=report.error,
                table_bytes=of_all.table_bytes,
                full_bytes=of_all.full_bytes,
            )
        )
    return out
