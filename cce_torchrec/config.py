"""Configuration of a CCE table: fields, checks, and the arithmetic of rows and bytes."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

from cce_torchrec.versions import check_installation

check_installation()  # before TorchRec is loaded, whose errors do not say what to do

from torchrec.modules.embedding_configs import (  # noqa: E402
    EmbeddingBagConfig,
    data_type_to_dtype,
)

from cce_torchrec.config_checks import (  # noqa: E402
    check_examples,
    check_id_ranges,
    check_inherited_fields,
    check_rotation,
    check_table_name,
    check_width,
    finite_number,
    whole_number,
)
from cce_torchrec.packing import CodePacking  # noqa: E402
from cce_torchrec.recipe import RECIPES, is_rare  # noqa: E402
from cce_torchrec.sizing import (  # noqa: E402
    BYTES_CHUNKS,
    DEFAULT_HELPER_RATIO,
    MAX_ROWS,
    Sizing,
    default_chunks,
)

_SEEN, _COUNTS = {"seen": 8}, {"counts": 2}
_WHOLE_NUMBERS = (
    "num_embeddings",
    "embedding_dim",
    "num_chunks",
    "num_rows",
    "num_helper_rows",
    "seed",
)


@dataclass(kw_only=True)
class CCEEmbeddingBagConfig(EmbeddingBagConfig):
    """A TorchRec table whose embeddings are composed of `num_chunks` columns of codebook rows.

    Chunk j of id x is `main_j[code_j(x)] + helper_j[hash_j(x)]`, of width
    `embedding_dim / num_chunks` (Tsang and Ahle, NeurIPS 2023, section 3).

    Every field of `EmbeddingBagConfig` keeps its meaning. `weight_init_min` and
    `weight_init_max` bound the embedding, not its two parts: main and helper are drawn so that
    their sum has the mean and variance that a plain table would have.

    Raises:
        ValueError: naming the table, the value and the remedy, if a field is not usable.
    """

    num_chunks: int = BYTES_CHUNKS
    """Columns (c); embedding_dim / num_chunks must be a multiple of 4."""
    num_rows: int = 0
    """Rows of the main codebook of each chunk (k)."""
    num_helper_rows: int | None = None
    """Rows of the helper codebook of each chunk (k'); None is 3 * num_rows, 0 is the finalized
    form, which has no helper and reads one row per chunk."""
    learned_codes: bool = True
    """False keeps the hash as the code forever: no code tensor and no clustering (with
    num_helper_rows=0 this is CE, and with one chunk the hashing trick)."""
    seed: int = 0
    """Seed of the table's hashes; part of its checkpoint."""
    hash_ids: bool = False
    """Ids are raw 64-bit values, hashed into [0, num_embeddings) by `seed` before anything else;
    none is out of bounds, and two that meet share an embedding."""
    track_seen: bool = False
    """Keep one bit per id, set by lookups in training since the last clustering, so that
    `cluster(weights="seen")` spends centroids on ids that were trained."""

    id_ranges: dict[str, range] | None = None
    """Which ids of the table each feature reads, whose own are counted from the first of them: so
    features with ids of their own share codebooks. None: all read the same ids, as in TorchRec."""
    rotate_chunks: bool = False
    """Embeddings of range i of `id_ranges`, in the order of their ids, begin with chunk i mod c."""

    recipe: str = "frequent"
    """How it is trained: "frequent", or "rare" for ids with few examples: main is set by `cluster`
    alone, from vectors shrunk by how often their ids were trained, and until then an id reads its
    helper row only. "auto" is "rare" below 100 examples an id; above, it shrinks too."""
    examples_per_id: float | None = None
    """Mean training rows of an id in one pass, sampled negatives too; "auto" needs it."""
    track_counts: bool | None = None
    """Keep counts of 4 bits an id, by which `cluster` shrinks; None: if `recipe` is given as "rare"
    or "auto"."""

    def __post_init__(self) -> None:
        self._check_whole_numbers()
        self._check_shape()
        self._resolve_recipe()
        # After names and numbers, by which these tell what is wrong.
        check_inherited_fields(self._who, self)
        names = self.feature_names or [self.name]
        check_id_ranges(self._who, self.id_ranges, names, self.num_embeddings)
        check_rotation(self._who, self.rotate_chunks, self.id_ranges)
        self.id_ranges = None if self.id_ranges is None else dict(self.id_ranges)
        self.num_helper_rows = self.helper_rows
        if self.num_helper_rows < 0:
            raise ValueError(f"{self._who}: num_helper_rows {self.num_helper_rows} is negative")
        if self.rows_per_chunk > MAX_ROWS:
            raise ValueError(
                f"{self._who}: num_rows + num_helper_rows = {self.rows_per_chunk} is more than a "
                f"code can hold ({MAX_ROWS}); use fewer rows"
            )
        self.has_custom_init = self.init_fn is not None
        super().__post_init__()

    def _check_whole_numbers(self) -> None:
        for name in _WHOLE_NUMBERS:
            if name != "num_helper_rows" or self.num_helper_rows is not None:
                setattr(self, name, whole_number(self._who, name, getattr(self, name)))

    def _check_shape(self) -> None:
        check_table_name(self._who, self.name)
        if self.num_embeddings < 1 or self.num_rows < 1 or self.num_chunks < 1:
            raise ValueError(
                f"{self._who}: num_embeddings {self.num_embeddings}, num_rows {self.num_rows} and "
                f"num_chunks {self.num_chunks} must all be at least 1; num_rows has no default, "
                "give it or use CCEEmbeddingBagConfig.from_params_per_dim or .from_bytes"
            )
        check_width(self._who, self.embedding_dim, self.num_chunks)

    def _resolve_recipe(self) -> None:
        if self.recipe not in RECIPES:
            raise ValueError(f"{self._who}: recipe {self.recipe!r} is none of {list(RECIPES)}")
        check_examples(self._who, self.examples_per_id)
        if self.track_counts not in (None, True, False):
            raise ValueError(f"{self._who}: track_counts {self.track_counts!r} is no bool")
        shrinks = self.recipe != "frequent"
        if self.recipe == "auto":
            examples = self.examples_per_id
            if examples is None:
                raise ValueError(
                    f"{self._who}: recipe 'auto' goes by the examples of an id, and "
                    f"examples_per_id is {examples}; give their mean number in one pass over the "
                    "data, or recipe='rare' or 'frequent'"
                )
            self.recipe = "rare" if is_rare(examples) else "frequent"
        if self.track_counts is None:
            self.track_counts = shrinks and self.learned_codes
        if self.track_counts and not self.learned_codes:
            raise ValueError(
                f"{self._who}: track_counts is for clusterings, and learned_codes=False has none; "
                "leave it out"
            )

    @property
    def _who(self) -> str:
        return f"table {self.name!r}"

    @property
    def helper_rows(self) -> int:
        """Rows of the helper codebook (k'), resolved."""
        rows = self.num_helper_rows
        return DEFAULT_HELPER_RATIO * self.num_rows if rows is None else rows

    @property
    def rows_per_chunk(self) -> int:
        """Rows of one physical table: main, then helper (k + k')."""
        return self.num_rows + self.helper_rows

    @property
    def rows_per_id(self) -> int:
        """Codebook rows that one id reads per chunk: 2, or 1 without a helper."""
        return 2 if self.helper_rows else 1

    @property
    def chunk_dim(self) -> int:
        """Width of one chunk (s = D / c)."""
        return self.embedding_dim // self.num_chunks

    @property
    def num_parameters(self) -> int:
        """Trained values: (k + k') * D."""
        return self.rows_per_chunk * self.embedding_dim

    @property
    def codebook_bytes(self) -> int:
        """Bytes of all codebooks."""
        return self.num_parameters * data_type_to_dtype(self.data_type).itemsize

    @property
    def code_bytes(self) -> int:
        """Bytes of the codes, 0 where they are not learned or have no bits."""
        return self.packing.nbytes(self.num_embeddings, self.num_chunks)

    @property
    def code_bits(self) -> int:
        """Bits of a code, 0 where codes are not learned: as few as tell `num_rows` rows apart.

        Above 4 an even number, and above 16 a multiple of 4, as these are read faster: 256 rows
        have 8 bits, 257 have 10. A table of one row has codes of 0 bits: a clustering step only
        restarts it (see `cluster`).
        """
        return self.packing.bits

    @property
    def packing(self) -> CodePacking:
        """How the codes lie in memory."""
        return CodePacking.of_rows(self.num_rows if self.learned_codes else 1)

    @property
    def seen_bytes(self) -> int:
        """Bytes of the bits of ids that were seen, 0 where they are not tracked."""
        return self.num_embeddings // 8 + 2 if self.track_seen else 0

    @property
    def notes(self) -> dict[str, int]:
        """What training notes of ids: names of the buffers, with the ids of a byte of each."""
        return (_SEEN if self.track_seen else {}) | (_COUNTS if self.track_counts else {})

    def notes_bytes(self, ids: int) -> int:
        """Bytes of the notes of so many ids; each buffer has a byte that belongs to none."""
        return sum(ids // ids_per_byte + 2 for ids_per_byte in self.notes.values())

    @property
    def trains_main(self) -> bool:
        """Whether optimizers train main rows; of the recipe "rare" they do not."""
        return self.recipe != "rare" or not self.learned_codes or not self.helper_rows

    @property
    def can_finalize(self) -> bool:
        """Whether `finalize` gives main the helper's rows; of the recipe "rare" it does not."""
        return self.recipe != "rare"

    @property
    def table_bytes(self) -> int:
        """Bytes of codebooks, codes and bits of seen ids; optimizer state is not counted."""
        return self.codebook_bytes + self.code_bytes + self.seen_bytes

    @property
    def full_bytes(self) -> int:
        """Bytes of the same table if it were a plain one."""
        itemsize = data_type_to_dtype(self.data_type).itemsize
        return self.num_embeddings * self.embedding_dim * itemsize

    def finalized(self) -> CCEEmbeddingBagConfig:
        """This table after `finalize`: main has the helper's rows, and there is no helper."""
        # Not by `replace`, which would resolve the recipe and the helper's rows anew.
        out = copy.copy(self)
        out.num_rows, out.num_helper_rows = self.rows_per_chunk, 0
        return out

    @classmethod
    def from_params_per_dim(
        cls,
        params_per_dim: int,
        *,
        helper_ratio: float | None = None,
        count_codes: bool = False,
        **kwargs: Any,
    ) -> CCEEmbeddingBagConfig:
        """A table with num_rows + num_helper_rows = `params_per_dim`.

        Args:
            helper_ratio: helper rows of a main row, of the recipe "frequent"; None is 3, or more if
                codes count. Main of the recipe "rare" has 16, 4, 2 or 1 rows, at most half of all.
            count_codes: main has so few rows, unless `helper_ratio` is given, that codes take at
                most half the bytes of codebooks, or 1.5 times as many for 16 rows or fewer; where
                the recipe is "rare" one row, and there are no codes.
            kwargs: further fields; `num_chunks` is 8, or 4 if codes count and there are some, or
                what fits the width.

        Raises:
            ValueError: if `params_per_dim` is below 2, which leaves no row for one of the two, or
                `helper_ratio` is negative.
        """
        who = f"table {kwargs.get('name', '')!r}"
        total = whole_number(who, "params_per_dim", params_per_dim)
        if total < 2:
            raise ValueError(
                f"{who}: params_per_dim {total} must be at least 2, one main and one helper row"
            )
        kwargs = {"num_chunks": default_chunks(kwargs, count_codes=count_codes), **kwargs}
        one = cls(num_rows=1, num_helper_rows=0, **kwargs)
        main = one._sizing(helper_ratio).main_rows(total, count_codes)
        return cls(num_rows=main, num_helper_rows=total - main, **kwargs)

    @classmethod
    def from_bytes(
        cls,
        table_bytes: int,
        *,
        helper_ratio: float | None = None,
        finalized: bool = False,
        **kwargs: Any,
    ) -> CCEEmbeddingBagConfig:
        """The largest table of at most `table_bytes` bytes, be it larger than a plain one.

        Its main rows are as many as `from_params_per_dim` makes with `count_codes`, or the next
        fewer that leave room for most rows. With `finalized` the bytes are also those that a table
        of the recipe "frequent" has once it was given to `finalize`, whose codes are wider.

        Raises:
            ValueError: if not even two rows a chunk fit.
        """
        who = f"table {kwargs.get('name', '')!r}"
        finite_number(who, "table_bytes", table_bytes)
        kwargs = {"num_chunks": default_chunks(kwargs, count_codes=True), **kwargs}
        # The smallest table there is tells what bytes do not depend on rows.
        least = cls(num_rows=1, num_helper_rows=1, **kwargs)
        finalized = finalized and least.can_finalize and least.learned_codes
        bytes_needed = (least.finalized() if finalized else least).table_bytes
        if bytes_needed > table_bytes:
            raise ValueError(
                f"{who}: {table_bytes} bytes do not hold two rows a chunk, which take "
                f"{bytes_needed}{' once they are finalized' * finalized}; use more bytes"
            )
        if finalized and helper_ratio is None:
            helper_ratio = DEFAULT_HELPER_RATIO
        room = int(table_bytes) - least.seen_bytes
        main, total = replace(least._sizing(helper_ratio), finalized=finalized).within(room)
        return cls(num_rows=main, num_helper_rows=total - main, **kwargs)

    def _sizing(self, helper_ratio: float | None) -> Sizing:
        """What the rows of a table like this follow from."""
        if helper_ratio is not None:
            finite_number(self._who, "helper_ratio", helper_ratio, 0.0)
        return Sizing(
            num_ids=self.num_embeddings,
            num_chunks=self.num_chunks,
            row_bytes=self.codebook_bytes // self.rows_per_chunk,
            recipe=self.recipe,
            learned_codes=self.learned_codes,
            helper_ratio=helper_ratio,
        )


def is_cce(config: Any) -> TypeGuard[CCEEmbeddingBagConfig]:
    """Whether a table is compressed; all others are plain, and TorchRec's own."""
    return isinstance(config, CCEEmbeddingBagConfig)


def all_rare(configs: Iterable[Any]) -> bool:
    """Whether all CCE tables with learned codes are of the recipe "rare", and there are some."""
    recipes = {config.recipe for config in configs if is_cce(config) and config.learned_codes}
    return recipes == {"rare"}
