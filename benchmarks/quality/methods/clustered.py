"""CCE by the package's own clustering step: as published, and by the defaults of the package.

The collection of the package has the codes, hashes and the clustering; its codebooks are views of
`Rows`, which train them. Tsang and Ahle, NeurIPS 2023, algorithm 3.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
import torchrec

from benchmarks.quality.budgets import FLOAT_BYTES, DoesNotFit, Share
from benchmarks.quality.embedder import Embedder, Tables
from benchmarks.quality.methods.shared import Joined
from benchmarks.quality.packing import code_bits, packed_bytes
from benchmarks.quality.rows import Block, Rows
from cce_torchrec import (
    CCEEmbeddingBagCollection,
    CCEEmbeddingBagConfig,
    ClusteringSchedule,
    cluster,
)
from cce_torchrec.chunk_order import rotated
from cce_torchrec.codes.chunk_codes import local_codes
from cce_torchrec.config_checks import table_names
from cce_torchrec.packing import CodePacking
from cce_torchrec.recipe import is_rare, recipe_fields
from cce_torchrec.sizing import DEFAULT_HELPER_RATIO
from cce_torchrec.table import physical_table

Settings = dict[str, Any]
"""Of a table: what `CCEEmbeddingBagConfig` is told beside its shape."""


class Clustered(Embedder):
    """CCE tables.

    Args:
        settings: of a table, by its number.
        clusterings: after which steps; None: the package's rule.
        resets_state: whether a clustering renews the optimizer's state, as the package's step does;
            published code keeps it.
    """

    def __init__(
        self,
        tables: Tables,
        *,
        settings: Callable[[int], Settings],
        clusterings: Collection[int] | None,
        resets_state: bool,
    ) -> None:
        super().__init__(tables)
        self.configs = [
            CCEEmbeddingBagConfig(
                name=name,
                num_embeddings=size,
                embedding_dim=tables.dim,
                feature_names=[name],
                seed=tables.seed,
                weight_init_min=-bound,
                weight_init_max=bound,
                **settings(number),
            )
            for number, (name, size, bound) in enumerate(
                zip(table_names(tables.names).values(), tables.sizes, tables.bounds, strict=True)
            )
        ]
        self.clusterings = self._by_rule() if clusterings is None else clusterings
        self.collection = CCEEmbeddingBagCollection(tables=self.configs)
        self.rows = self._adopted()
        self.optimizer = self._optimizer() if resets_state else None
        self.index = self._index()

    def _by_rule(self) -> Collection[int]:
        # These are of one recipe, whatever the run has beside them.
        passes = self.tables.passes
        steps = self.tables.steps // passes
        return ClusteringSchedule.for_tables(self.configs, passes, steps).steps

    def _bags(self) -> list[torch.nn.Module]:
        bags = self.collection.embedding_bags
        return [
            bags[physical_table(config.name, chunk)]
            for config in self.configs
            for chunk in range(config.num_chunks)
        ]

    def _adopted(self) -> Rows:
        """`Rows` with the values of the collection, whose weights become views of them."""
        bags = self._bags()
        blocks = [Block(len(bag.weight), 0.0) for bag in bags]
        rows = Rows(blocks, bags[0].weight.shape[1], self.tables.training)
        with torch.no_grad():
            for bag, part in zip(bags, rows.blocks_of(rows.weight.detach()), strict=True):
                part.copy_(bag.weight)
                bag.weight.data = part
        return rows

    def _optimizer(self) -> torch.optim.Optimizer | None:
        """An optimizer by which the clustering step finds the state of `Rows`."""
        if self.rows.adam is not None:
            raise ValueError("state of Adam is not reset here; train by row-wise Adagrad")
        weights = [bag.weight for bag in self._bags()]
        kind = (
            torchrec.optim.RowWiseAdagrad if self.rows.state.shape[1] == 1 else torch.optim.Adagrad
        )
        optimizer = kind(weights)
        for weight, state in zip(weights, self.rows.blocks_of(self.rows.state), strict=True):
            optimizer.state[weight]["sum"] = state
        return optimizer

    def _index(self) -> torch.Tensor:
        """Rows [N, 2 c] of all ids: main rows of all chunks, then helper rows."""
        out, block = [], 0
        for config in self.configs:
            codes = local_codes(self.collection.codes, config.name)
            ids = torch.arange(config.num_embeddings)
            first = torch.tensor(self.rows.first[block : block + config.num_chunks])[:, None]
            block += config.num_chunks
            main = codes.main_rows(ids) + first
            helper = codes.helper_rows(ids) + first + config.num_rows
            out.append(torch.cat([main, helper]).t())
        return torch.cat(out)

    def lookup(self, ids: torch.Tensor, training: bool) -> torch.Tensor:
        """See `Embedder`."""
        self.collection.restore_main()  # before it is read, as the collection's own lookups do
        for column, config in enumerate(self.configs if training else ()):
            codes = local_codes(self.collection.codes, config.name)
            codes.begin_batch()
            codes.note(ids[:, column] - self.tables.first[column])
        rows = self.index.index_select(0, ids.reshape(-1))
        parts = self.rows.read(rows.view(len(rows), 2, -1), training)
        return parts.sum(1).view(*ids.shape, self.tables.dim)

    def step(self) -> None:
        """See `Embedder`."""
        self.rows.step()

    def after(self, step: int) -> None:
        """A clustering, when one is due."""
        if step in self.clusterings:
            cluster(self.collection, optimizer=self.optimizer)
            self.index = self._index()

    @property
    def parameters(self) -> int:
        """See `Embedder`."""
        return self.rows.weight.numel()

    @property
    def made(self) -> str:
        """See `Embedder`; a table of one main row has no codes, and is CE."""
        rows = sorted({config.num_rows for config in self.configs})
        return f"{', '.join(map(str, rows))} main row{'s' if rows != [1] else ''}"

    @property
    def stored_bytes(self) -> int:
        """See `Embedder`."""
        return sum(
            packed_bytes(c.num_embeddings, c.num_chunks * code_bits(c.num_rows))
            for c in self.configs
        )

    @property
    def training_bytes(self) -> int:
        """See `Embedder`."""
        held = sum(c.code_bytes + c.notes_bytes(c.num_embeddings) for c in self.configs)
        return FLOAT_BYTES * (self.parameters + self.rows.state_values) + held


def main_rows_within(size: int, share: Share, dim: int, chunks: int, helper_ratio: int) -> int:
    """The most main rows that fit `share` with their helper rows and the codes of `size` ids.

    Raises:
        DoesNotFit: not even two rows, and one bit a code, do.
    """

    def fits(rows: int) -> bool:
        codes = packed_bytes(size, chunks * code_bits(rows))
        return (1 + helper_ratio) * rows * dim <= share.values(codes)

    if not fits(2):
        codes = packed_bytes(size, chunks)
        needed = codes + 2 * (1 + helper_ratio) * dim * FLOAT_BYTES
        raise DoesNotFit(
            f"a table of {size:,} ids has {share.amount:,} "
            f"{'bytes' if share.counts_bytes else 'parameters'}, and two main rows in {chunks} "
            f"chunks need {needed:,} bytes, {codes:,} of them for codes"
        )
    low, high = 2, share.amount
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def as_published(tables: Tables) -> Clustered:
    """CCE as its paper trains it: k' = k, 7 clusterings to 70 % of training, all state kept.

    For ten passes those are the ends of passes 1 to 7.
    """
    steps = {round(tables.steps * (i + 1) / 10) for i in range(7)}
    return Clustered(tables, settings=in_ratio(tables, 1), clusterings=steps, resets_state=False)


def frequent_recipe(tables: Tables) -> Clustered:
    """CCE by the package's recipe for ids that occur often, without shrinkage."""
    schedule = ClusteringSchedule.for_training(tables.passes, tables.steps // tables.passes)
    return Clustered(
        tables,
        settings=in_ratio(tables, DEFAULT_HELPER_RATIO),
        clusterings=schedule.steps,
        resets_state=True,
    )


def in_ratio(tables: Tables, helper_ratio: int) -> Callable[[int], Settings]:
    """As many main rows as fit, with `helper_ratio` helper rows each; the form has the chunks."""
    chunks = int(tables.form.removesuffix(" chunks"))

    def settings(number: int) -> Settings:
        size, share = tables.sizes[number], tables.shares[number]
        rows = main_rows_within(size, share, tables.dim, chunks, helper_ratio)
        return {
            "num_chunks": chunks, "num_rows": rows, "num_helper_rows": helper_ratio * rows,
        }  # fmt: skip

    return settings


def rare_recipe(tables: Tables) -> Clustered:
    """CCE by the package's recipe for ids with few examples; "4 chunks, 16 rows" of main."""
    chunks, rows = (int(part.split()[0]) for part in tables.form.split(", "))

    def settings(number: int) -> Settings:
        size, share = tables.sizes[number], tables.shares[number]
        codes = CodePacking.of_rows(rows).nbytes(size, chunks)
        helper = share.rows(tables.dim, codes, at_least=rows + 1) - rows
        return {
            "num_chunks": chunks, "num_rows": rows, "num_helper_rows": helper, "recipe": "rare",
        }  # fmt: skip

    schedule = ClusteringSchedule.for_training(
        tables.passes, tables.steps // tables.passes, rare=True
    )
    return Clustered(tables, settings=settings, clusterings=schedule.steps, resets_state=True)


def ours(tables: Tables) -> Embedder:
    """CCE as the package makes it of a budget alone: rows, recipe and joint tables by its rules.

    Those are the ones of the training program: recipe "auto", schedule `for_tables`, and, but
    where a network multiplies two embeddings, one table for all features of rare ids.
    """
    pairs, multiplies = zip(tables.names, tables.examples, strict=True), tables.model == "gmf"
    rare = {name for name, examples in pairs if is_rare(examples, multiplies=multiplies)}
    # Rare ones apart from others in any case: they may have other chunks.
    if len(rare) > 1 or 0 < len(rare) < len(tables.names):
        return Rotated(by_budget, tables, rare)
    return by_budget(tables)


class Rotated(Joined):
    """A joint table whose features begin with another chunk each, as `joint_table` makes them."""

    def in_order(self, vectors: torch.Tensor) -> torch.Tensor:
        """See `Joined`."""
        (columns, table), *_ = self.parts
        assert isinstance(table, Clustered)
        first = torch.arange(len(columns)).repeat(len(vectors))
        flat = vectors.reshape(-1, self.tables.dim)
        return rotated(flat, first, table.configs[0].num_chunks).view_as(vectors)


def by_budget(tables: Tables, recipe: str | None = None) -> Clustered:
    """CCE tables of rows that follow from the bytes; None: the recipe from the examples."""

    def settings(number: int) -> Settings:
        size, share = tables.sizes[number], tables.shares[number]
        asked = {"recipe": recipe, "track_counts": True}
        if recipe is None:
            asked = recipe_fields(tables.examples[number], multiplies=tables.model == "gmf")
        fields = dict(name="sized", num_embeddings=size, embedding_dim=tables.dim, **asked)
        try:
            if share.counts_bytes:
                made = CCEEmbeddingBagConfig.from_bytes(share.amount, **fields)
            else:
                rows = share.amount // tables.dim
                made = CCEEmbeddingBagConfig.from_params_per_dim(rows, **fields)
        except ValueError as error:
            raise DoesNotFit(str(error)) from error
        return {
            "num_chunks": made.num_chunks, "num_rows": made.num_rows,
            "num_helper_rows": made.helper_rows, "recipe": made.recipe,
            "track_counts": made.track_counts,
        }  # fmt: skip

    return Clustered(tables, settings=settings, clusterings=None, resets_state=True)
