"""What to make of the tables of a data set: how often ids occur, forms, bytes, and what to expect.

Simple rules, each from a measurement that is named in what is said; none replaces a run of one's
own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torchrec.modules.embedding_configs import BaseEmbeddingConfig, EmbeddingBagConfig

from cce_torchrec.config import CCEEmbeddingBagConfig, is_cce
from cce_torchrec.config_checks import finite_number, table_names, whole_number
from cce_torchrec.data import Examples, Share
from cce_torchrec.kmeans import kmeans
from cce_torchrec.modules.compressed_tables import Form, Made, made_of, ratio_for
from cce_torchrec.modules.compressible import full_bytes
from cce_torchrec.planning.loss_curves import CURVES, Curve
from cce_torchrec.recipe import is_rare
from cce_torchrec.sizing import BYTES_CHUNKS

IMPORT = (
    "where full tables can be trained, train those and import them "
    "(cce_torchrec.clustering.import_table): that lost less than any table that was trained "
    "compressed wherever it was measured (docs/results.md)"
)
HEAD = 0.01
"""The part of the ids whose share of the traffic is told."""
_BATCH = 65_536
_CENTROIDS, _SAMPLE = 256, 65_536


@dataclass(frozen=True, kw_only=True)
class TableAdvice:
    """One feature: what the data hold of its ids, and what to make of its table."""

    name: str
    num_embeddings: int
    trained_ids: int
    """Ids with an example or more."""
    examples_per_id: float
    """In one pass, of all ids."""
    head_share: float
    """Part of the examples that the most frequent hundredth of the ids has."""
    full_bytes: int
    bytes: int
    """Advised; of a joint table in proportion to ids."""
    form: str
    """Full, or how it is compressed."""
    explained: float | None
    """Of a trained full table: the part of its variance that 256 centroids a chunk keep."""
    explained_of_noise: float | None
    """The same of as many random rows: what it keeps beyond is structure of the table."""


@dataclass(frozen=True, kw_only=True)
class Advice:
    """What `advise` says; prints as a table."""

    tables: list[TableAdvice]
    configs: list[BaseEmbeddingConfig]
    """The tables as advised, for `CCEEmbeddingBagCollection`."""
    expected_increase: float
    """Log loss more than by full tables, by the curve that it rests on."""
    rests_on: str

    @property
    def bytes(self) -> int:
        """Of all tables as advised."""
        return sum(table.bytes for table in self.tables)

    def __str__(self) -> str:
        header = ("feature", "ids", "trained", "examples an id", f"hottest {HEAD:.0%}",
                  "full bytes", "bytes", "kept", "form")  # fmt: skip
        rows: list[tuple[str, ...]] = [header]
        for t in self.tables:
            kept = ""
            if t.explained is not None:
                kept = f"{t.explained:.0%} (noise {t.explained_of_noise:.0%})"
            numbers = (f"{n:,}" for n in (t.full_bytes, t.bytes))
            counts = f"{t.num_embeddings:,}", f"{t.trained_ids:,}", f"{t.examples_per_id:,.1f}"
            rows.append((t.name, *counts, f"{t.head_share:.0%}", *numbers, kept, t.form))
        widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
        lines = [
            "  ".join(
                cell.ljust(width) if at in (0, len(header) - 1) else cell.rjust(width)
                for at, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        full = sum(t.full_bytes for t in self.tables)
        lines.append(f"{self.bytes:,} bytes instead of {full:,}")
        return "\n".join([*lines, self.rests_on, IMPORT])


def id_counts(examples: Examples) -> dict[str, torch.Tensor]:
    """Training examples in one pass of each id of each feature, int64 [ids]; reads all of them."""
    names = list(examples.features)
    counts = {name: torch.zeros(n, dtype=torch.int64) for name, n in examples.features.items()}
    # Examples that fill no batch are left out: less than one of 256.
    size = max(1, min(_BATCH, examples.num_train // 256))
    for rows in examples.batches(Share(batch_size=size), seed=0, epoch=0):
        columns = [*rows.ids.unbind(1), *(bag.values for bag in rows.bags)]
        for name, ids in zip(names, columns, strict=True):
            counts[name] += torch.bincount(ids, minlength=len(counts[name]))
    return counts


def advise(
    counts: Mapping[str, torch.Tensor],
    *,
    embedding_dim: int,
    table_bytes: int | None = None,
    loss_increase: float | None = None,
    multiplies: bool = False,
    min_bytes: int = 1 << 20,
    num_chunks: int | None = None,
    weights: Mapping[str, torch.Tensor] | None = None,
) -> Advice:
    """What to make of tables whose ids occur as `counts` says.

    Args:
        counts: by feature, training examples in one pass of each id, int64 [ids], sampled
            negatives too; `id_counts` has them of a data set.
        embedding_dim: of all tables.
        table_bytes: for the tables that are compressed. One of the two budgets.
        loss_increase: log loss that may be added, from which bytes follow by a curve that was
            measured on a public data set of ids as frequent.
        multiplies: whether the network multiplies the embeddings of two features (GMF, two towers),
            so that tables stay apart, and none is trained by the recipe "rare".
        min_bytes: bytes from which a table is compressed.
        num_chunks: most chunks of a table; None: 4, or 8 of rare ids, which have no codes.
        weights: trained full tables [ids, embedding_dim], by feature, where there are some.

    Raises:
        ValueError: not one budget, no table to compress, counts or weights of other shapes.
    """
    _check_budget(table_bytes, loss_increase)
    _check(counts, embedding_dim, weights or {})
    plain = _plain(counts, embedding_dim)
    large = _large(plain, min_bytes)
    examples = {c.name: float(counts[_feature(c)].sum()) / c.num_embeddings for c in large}
    whole = sum(map(full_bytes, large))
    curve = _curve(large, examples, multiplies)
    budget = (
        round(whole * curve.share(loss_increase or 0.0)) if table_bytes is None else table_bytes
    )
    form = Form(
        num_chunks=num_chunks,
        seed=0,
        examples_per_id=examples,
        joint="no" if multiplies else "rare",
        multiplies=multiplies,
        count_codes=True,
    )
    # A small table is read as fast whole, and its ids are mostly frequent.
    stay = {c.name: "small" for c in plain if c not in large or budget >= whole}
    ratio = 1.0 if budget >= whole else ratio_for([(plain, stay)], budget, form)
    made = made_of(plain, stay, ratio, form)
    explained = _explained(weights or {}, num_chunks)
    told = {
        config.name: told
        for one in made
        for config, told in zip(one.of, _told(one, counts, explained), strict=True)
    }
    # What it is of the budget: small tables stay as they are, and are not a part of it.
    taken = sum(told[config.name].bytes for config in large)
    increase, rests_on = _expected(curve, taken / whole, loss_increase)
    return Advice(
        tables=[told[config.name] for config in plain],
        configs=[one.table for one in made],
        expected_increase=increase,
        rests_on=rests_on,
    )


def _expected(curve: Curve, share: float, asked: float | None) -> tuple[float, str]:
    """By how much log loss would rise at `share` of the full bytes, and what that rests on."""
    beyond = "" if asked is None else curve.beyond(asked)
    if share >= 1:
        return 0.0, f"all tables stay full{beyond or ', as the budget holds them'}"
    increase = curve.increase(share)
    return increase, (
        f"compressed tables take {share:.1%} of their full bytes; there log loss rose "
        f"by {increase:.3f} on {curve.measured}{beyond}. Other data differ: train both, and compare"
    )


def _told(
    made: Made,
    counts: Mapping[str, torch.Tensor],
    explained: Mapping[str, tuple[float, float]],
) -> list[TableAdvice]:
    """The features of one table as it is made."""
    ids = sum(config.num_embeddings for config in made.of)
    size = made.table.table_bytes if is_cce(made.table) else full_bytes(made.table)
    out = []
    for config in made.of:
        own, kept = counts[_feature(config)], explained.get(_feature(config))
        out.append(
            TableAdvice(
                name=_feature(config),
                num_embeddings=config.num_embeddings,
                trained_ids=int((own > 0).sum()),
                examples_per_id=float(own.sum()) / config.num_embeddings,
                head_share=head_share(own),
                full_bytes=full_bytes(config),
                bytes=size * config.num_embeddings // ids,
                form=_form(made.table, joint=len(made.of) > 1),
                explained=kept[0] if kept else None,
                explained_of_noise=kept[1] if kept else None,
            )
        )
    return out


def head_share(counts: torch.Tensor) -> float:
    """Part of the examples that the most frequent `HEAD` of the ids has."""
    hottest = counts.sort(descending=True).values[: max(1, math.ceil(HEAD * len(counts)))]
    return float(hottest.sum()) / max(1, int(counts.sum()))


def explained_variance(weight: torch.Tensor, num_chunks: int) -> float:
    """The part of the variance of rows [ids, D] that 256 centroids for each chunk keep.

    Of a sample of 65,536 rows. As product quantisation of the trained table would have it: training
    a compressed table moves rows to where they serve, so it is a sign and no bound. Random rows
    keep much as well where chunks are narrow, or rows few.
    """
    pick = torch.randperm(len(weight), generator=torch.Generator().manual_seed(0))[:_SAMPLE]
    rows = weight.detach().float().cpu()[pick]
    left = total = 0.0
    for chunk in rows.chunk(num_chunks, dim=1):
        result = kmeans(chunk.contiguous(), min(_CENTROIDS, len(chunk)))
        left += float((chunk - result.centroids[result.assignment.long()]).square().sum())
        total += float((chunk - chunk.mean(0)).square().sum())
    return 1.0 - left / total if total else 1.0


def _plain(counts: Mapping[str, torch.Tensor], dim: int) -> list[BaseEmbeddingConfig]:
    """Full tables of the features."""
    names = table_names(counts)
    return [
        EmbeddingBagConfig(
            name=names[name], num_embeddings=len(own), embedding_dim=dim, feature_names=[name]
        )
        for name, own in counts.items()
    ]


def _feature(table: BaseEmbeddingConfig) -> str:
    """The one that reads it, which is not called like the table where no table may be called so."""
    return table.feature_names[0]


def _large(tables: Sequence[BaseEmbeddingConfig], min_bytes: int) -> list[BaseEmbeddingConfig]:
    """Those that are compressed.

    Raises:
        ValueError: none is.
    """
    finite_number("advise", "min_bytes", min_bytes)
    large = [config for config in tables if full_bytes(config) >= min_bytes]
    if not large:
        raise ValueError(
            f"no table has {min_bytes:,} bytes or more, and small ones are best left whole; lower "
            "min_bytes"
        )
    return large


def _explained(
    weights: Mapping[str, torch.Tensor], num_chunks: int | None
) -> dict[str, tuple[float, float]]:
    """What centroids keep of each table, and of noise of the same shape."""
    num_chunks = num_chunks or BYTES_CHUNKS
    # Beside noise, as any few rows in narrow chunks are near some centroid.
    return {
        name: (explained_variance(own, num_chunks), explained_variance(_noise(own), num_chunks))
        for name, own in weights.items()
    }


def _noise(weight: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(len(weight), weight.shape[1], generator=generator)


def _check_budget(table_bytes: int | None, loss_increase: float | None) -> None:
    if (table_bytes is None) == (loss_increase is None):
        raise ValueError("give one of table_bytes and loss_increase")
    if table_bytes is not None:
        finite_number("advise", "table_bytes", table_bytes)
    elif finite_number("advise", "loss_increase", loss_increase) <= 0:
        raise ValueError(f"loss_increase {loss_increase} must be positive; full tables have none")


def _check(
    counts: Mapping[str, torch.Tensor], embedding_dim: int, weights: Mapping[str, torch.Tensor]
) -> None:
    if whole_number("advise", "embedding_dim", embedding_dim) < 1:
        raise ValueError(f"embedding_dim {embedding_dim} must be 1 or more")
    for name, own in [*counts.items(), *weights.items()]:
        if not isinstance(own, torch.Tensor):
            raise ValueError(f"{name!r} has a {type(own).__name__}; give tensors")
    for name, own in counts.items():
        if own.dim() != 1 or not len(own) or own.is_floating_point() or int(own.min()) < 0:
            raise ValueError(
                f"counts of {name!r} are {own.dtype} {list(own.shape)}; give a number of examples, "
                "0 or more, for each id"
            )
    for name, weight in weights.items():
        if name not in counts:
            raise ValueError(f"weights of {name!r}, and counts of {sorted(counts)}; name a feature")
        if list(weight.shape) != [len(counts[name]), embedding_dim]:
            raise ValueError(
                f"weights of {name!r} are {list(weight.shape)}; give "
                f"[{len(counts[name])}, {embedding_dim}], a row for each id"
            )


def _curve(
    tables: Sequence[BaseEmbeddingConfig], examples: Mapping[str, float], multiplies: bool
) -> Curve:
    """That of the recipe that most of the bytes are of."""
    # One curve for all, as no data set was measured with both kinds of tables in it.
    rare = sum(full_bytes(t) for t in tables if is_rare(examples[t.name], multiplies=multiplies))
    mostly = 2 * rare >= sum(map(full_bytes, tables))
    return next(curve for curve in CURVES if curve.rare == mostly)


def _form(table: BaseEmbeddingConfig, joint: bool) -> str:
    if not is_cce(table):
        return "full"
    shared = f"in {table.name!r}, " if joint else ""
    return shared + _said(table)


def _said(table: CCEEmbeddingBagConfig) -> str:
    rows = f"{table.num_rows} + {table.helper_rows:,} rows in {table.num_chunks} chunks"
    if not table.code_bits:
        return f"CE, {rows}"
    return f"CCE, {table.recipe}, {rows}, {table.code_bits}-bit codes"
