"""A table as it is now: its configuration, its chunks, and the names of what stands behind it."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from torchrec.modules.embedding_configs import EmbeddingBagConfig

from cce_torchrec.chunk_order import first_chunk
from cce_torchrec.config import CCEEmbeddingBagConfig, is_cce


@dataclass(frozen=True)
class TableFeature:
    """One feature of one table, as the user configured it."""

    table: str
    feature: str


class Table:
    """A table of one collection, CCE or plain; what it is now is said here and nowhere else.

    Args:
        config: as the user gave it; `finalize` puts another in its place.
    """

    def __init__(self, config: EmbeddingBagConfig) -> None:
        self.config = config

    @property
    def name(self) -> str:
        """The user's name of it."""
        return self.config.name

    @property
    def cce(self) -> CCEEmbeddingBagConfig | None:
        """Its configuration if it is compressed, None of a plain table."""
        return self.config if is_cce(self.config) else None

    @property
    def compressed(self) -> CCEEmbeddingBagConfig:
        """The configuration of a table that is known to be compressed."""
        assert is_cce(self.config), f"table {self.name!r} is plain"
        return self.config

    @property
    def chunks(self) -> Sequence[int | None]:
        """Numbers of its chunks; a plain table is one piece, None."""
        return [None] if self.cce is None else range(self.cce.num_chunks)

    def chunks_of(self, feature: str) -> list[int | None]:
        """Numbers of its chunks in the order in which the embeddings of a feature have them."""
        config = self.cce
        if config is None or not config.rotate_chunks or not config.id_ranges:
            return list(self.chunks)
        starts = [ids.start for ids in config.id_ranges.values()]
        first = first_chunk(starts, config.id_ranges[feature].start, config.num_chunks)
        return [*range(first, config.num_chunks), *range(first)]

    @property
    def frozen_rows(self) -> dict[str, int]:
        """Names of its chunks' TorchRec tables, each with its first rows that are not trained."""
        config = self.cce
        # Main of rare ids is set by clustering alone.
        if config is None or config.trains_main:
            return {}
        chunks = range(config.num_chunks)
        return {physical_table(self.name, chunk): config.num_rows for chunk in chunks}

    @property
    def rows_per_id(self) -> int:
        """Rows that an id reads of each chunk."""
        return 1 if self.cce is None else self.cce.rows_per_id

    def finalize(self) -> None:
        """Main has the helper's rows from now on, and there is no helper."""
        self.config = self.compressed.finalized()


def tables_of(configs: Iterable[EmbeddingBagConfig]) -> list[Table]:
    """The tables of one collection."""
    return [Table(config) for config in configs]


def physical_table(table: str, chunk: int) -> str:
    """Name of the TorchRec table that holds one chunk of a CCE table."""
    return f"{table}#{chunk}"


def codes_key(prefix: str, table: str) -> str:
    """Name of a table's codes in the state dict of a collection, whose keys begin with `prefix`."""
    return f"{prefix}codes.{table}.codes"


def logical_table(physical: str) -> str:
    """Name of the table that the TorchRec table `physical` is a chunk of, or that it is."""
    # Users' tables have no '#' in their names: it is refused.
    return physical.split("#")[0]


def physical_feature(table: str, feature: str, chunk: int | None) -> str:
    """Feature name of one chunk (None: of a plain table); unambiguous, as tables have no '#'."""
    return f"{table}#{'' if chunk is None else chunk}.{feature}"


def called(path: str, name: str) -> bool:
    """Whether the table at `path` ("collection.user") is meant by `name`, of any length."""
    return path == name or path.endswith(f".{name}")


def named(names: Iterable[str], paths: Collection[str], argument: str) -> set[str]:
    """Those of `paths` that `names` mean; names may leave out the collection.

    Args:
        names: as a caller gave them.
        paths: of all tables.
        argument: what the caller calls them.

    Raises:
        ValueError: naming what no table is called, and what is called most like it.
    """
    # A name may mean several tables, one in each collection.
    chosen: set[str] = set()
    for name in names:
        found = {path for path in paths if called(path, name)}
        if not found:
            known = {path.rpartition(".")[2]: path for path in paths} | dict.fromkeys(paths, "")
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{argument}: no table {name!r}; the model has {sorted(paths)}{hint}")
        chosen |= found
    return chosen


def refuse_none(names: Collection[str] | None) -> None:
    """Raises ValueError if `tables` is an empty list, with which a call would do nothing."""
    if names is not None and not names:
        raise ValueError("tables=[] names no table; name some, or leave it out")
