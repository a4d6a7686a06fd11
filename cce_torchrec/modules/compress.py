"""Adoption in one call: the large tables of an existing model become CCE tables."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields

import torch.distributed as dist
from torch import nn
from torchrec.modules.embedding_configs import BaseEmbeddingConfig, EmbeddingBagConfig

from cce_torchrec.config import CCEEmbeddingBagConfig, is_cce
from cce_torchrec.joint import has_default_init
from cce_torchrec.modules.compressible import Found, collections_of, full_bytes, remade
from cce_torchrec.table import refuse_none
from cce_torchrec.torchrec_internals import optimizers_in_backward

logger = logging.getLogger(__name__)

_ALREADY = "compressed already"


@dataclass(frozen=True, kw_only=True)
class CompressedTable:
    """What `compress_model` did to one table."""

    collection: str
    """Path in the model of its collection, or of the module that it is an attribute of."""
    name: str
    num_embeddings: int
    full_bytes: int
    bytes: int
    num_rows: int
    """0 where the table stayed full."""
    num_helper_rows: int
    num_chunks: int
    reason: str
    """Why the table stayed as it was; empty where it was compressed."""


@dataclass(frozen=True)
class CompressionReport:
    """What `compress_model` did; prints as a table."""

    tables: list[CompressedTable]

    @property
    def full_bytes(self) -> int:
        """Bytes of all tables before."""
        return sum(table.full_bytes for table in self.tables)

    @property
    def bytes(self) -> int:
        """Bytes of all tables after: codebooks, codes, and tables that stayed full."""
        return sum(table.bytes for table in self.tables)

    def __str__(self) -> str:
        header = ("table", "ids", "full bytes", "bytes", "rows", "helper", "chunks", "")
        rows: list[tuple[str, ...]] = [header]
        for t in self.tables:
            rows.append(
                (
                    f"{t.collection}.{t.name}",
                    *(f"{n:,}" for n in (t.num_embeddings, t.full_bytes, t.bytes)),
                    *(f"{n:,}" if t.num_rows else "-" for n in (t.num_rows, t.num_helper_rows)),
                    str(t.num_chunks) if t.num_rows else "-",
                    t.reason,
                )
            )
        widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
        lines = ["  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
        ratio = self.full_bytes / max(1, self.bytes)
        total = f"{self.full_bytes:,} bytes became {self.bytes:,} ({ratio:.1f} times fewer)"
        return "\n".join([*(line.rstrip() for line in lines), total])


def compress_model(
    model: nn.Module,
    *,
    tables: Sequence[str] | None = None,
    min_bytes: int = 1 << 20,
    compression: float | None = None,
    num_rows: int | None = None,
    table_bytes: int | None = None,
    examples_per_id: Mapping[str, float] | None = None,
    num_chunks: int = 4,
    seed: int = 0,
    verbose: bool = True,
) -> CompressionReport:
    """Replaces, in place, every collection of `model` that has tables to compress.

    These are TorchRec's EmbeddingBagCollections and EmbeddingCollections, and those that an earlier
    call has made, whose plain tables may be compressed as well. Call it before optimizers are
    applied and the model is sharded. Tables that are compressed now start fresh, others keep their
    weights and codes. Whatever stays as it is, is in the report with the reason.

    Args:
        tables: names of the tables to compress; None compresses all of at least `min_bytes`.
        min_bytes: bytes from which a table is compressed if none are named.
        compression: full over compressed parameters of each table. One of the three budgets.
        num_rows: main rows of each table, with 3 times as many helper rows.
        table_bytes: bytes for all tables that this call compresses, codes counted; one compression
            ratio is found for all of them.
        examples_per_id: by table, the mean training examples of an id in one pass. Tables that are
            named get the recipe "auto" (see `CCEEmbeddingBagConfig`), others "frequent".
        num_chunks: most chunks of a table; fewer where embedding_dim asks for it.
        seed: of the hashes.
        verbose: print the report too, on the first rank.

    Raises:
        ValueError: not one positive budget, unknown table names, tables of modules that are left
            alone, no table chosen where none is compressed already, `table_bytes` too few for the
            codes, an optimizer applied already, or a model that is a collection itself.
    """
    refuse_none(tables)
    ratio = _checked_ratio(compression, num_rows, table_bytes, num_chunks)
    found = collections_of(model)
    chosen = _choose(model, found, tables, min_bytes)
    form = Form(num_chunks=num_chunks, seed=seed, examples_per_id=examples_per_id or {})
    form.check_names({name for _, name in chosen})
    if table_bytes is not None:
        ratio = _ratio_for(list(chosen.values()), table_bytes, form)
    made: list[CompressedTable] = []
    replacements: dict[nn.Module, nn.Module] = {}
    for at in found:
        new = []
        for config in at.configs:
            table, reason = config, at.reason or (_ALREADY if is_cce(config) else "not chosen")
            if (at.path, config.name) in chosen:
                table, reason = compressed(config, ratio, form, num_rows)
            new.append(table)
            made.append(_describe(at.path, config, table, reason))
        if any(table is not config for table, config in zip(new, at.configs, strict=True)):
            replacements[at.module] = _replacement(at, new)
    _replace(model, replacements)
    report = CompressionReport(made)
    if not replacements:
        reasons = {f"{table.collection}.{table.name}": table.reason for table in made}
        logger.warning("nothing was compressed, every table stays as it is: %s", reasons)
    if verbose:
        _print_on_first_rank(report)
    return report


def _print_on_first_rank(report: CompressionReport) -> None:
    if not (dist.is_initialized() and dist.get_rank()):
        print(report)


def _checked_ratio(
    compression: float | None, num_rows: int | None, table_bytes: int | None, num_chunks: int
) -> float:
    """`compression`, or 1 where another of the three budgets is given."""
    if sum(value is not None for value in (compression, num_rows, table_bytes)) != 1:
        raise ValueError("give exactly one of compression, num_rows and table_bytes")
    ratio = compression if compression is not None else 1.0
    if not ratio > 0 or num_chunks < 1:
        raise ValueError(
            f"compression {ratio} must be positive, and num_chunks {num_chunks} at least 1"
        )
    return ratio


def _replace(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> None:
    """Puts the new modules wherever `model` has the old ones, which may be in several places."""
    # A list: the modules that are walked over are replaced meanwhile.
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if module in replacements:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, replacements[module])


def _choose(
    model: nn.Module, found: list[Found], tables: Sequence[str] | None, min_bytes: int
) -> dict[tuple[str, str], BaseEmbeddingConfig]:
    """The tables to compress, by path of the collection and name; those that are, are left out.

    Raises:
        ValueError: unknown names, none at all, or a collection that cannot be replaced.
    """
    every = {(at.path, c.name): c for at in found for c in at.configs if not at.reason}
    left = {c.name: at for at in found for c in at.configs if at.reason}
    _refuse_unknown(set(tables or ()), {name for _, name in every}, left)
    plain = {key: config for key, config in every.items() if not is_cce(config)}
    chosen = {
        key: config
        for key, config in plain.items()
        if (full_bytes(config) >= min_bytes if tables is None else key[1] in tables)
    }
    # Where some are compressed already, a second call may well find no more.
    if not chosen and len(plain) == len(every):
        stay = "".join(f"; table {name!r} stays: {at.reason}" for name, at in left.items())
        raise ValueError(
            f"nothing to compress: no EmbeddingBagCollection or EmbeddingCollection inside "
            f"{type(model).__name__} has a table of {min_bytes} bytes or more; lower min_bytes or "
            f"name tables{stay}"
        )
    _refuse_itself(model, chosen)
    return chosen


def _refuse_unknown(asked: set[str], names: set[str], left: dict[str, Found]) -> None:
    """Raises for tables that are asked for and cannot be compressed, or that there are not."""
    for name in sorted(asked - names):
        if name in left:
            raise ValueError(f"table {name!r} of {left[name].path!r} stays: {left[name].reason}")
    if asked - names:
        raise ValueError(f"no tables {sorted(asked - names)}; the model has {sorted(names)}")


def _refuse_itself(model: nn.Module, chosen: dict[tuple[str, str], BaseEmbeddingConfig]) -> None:
    """Raises where the model itself would have to be replaced."""
    if any(path == "" for path, _ in chosen):
        raise ValueError(
            f"the model is an {type(model).__name__} itself, which cannot be replaced in place; "
            "build its CCE form, or wrap it in a module"
        )


def _chunks(dim: int, most: int) -> int:
    """The largest number of chunks up to `most` whose width is a multiple of 4; 0 if none is."""
    return next((c for c in range(most, 0, -1) if dim % (4 * c) == 0), 0)


@dataclass(frozen=True, kw_only=True)
class Form:
    """What compressed tables have in common."""

    num_chunks: int
    """At most."""
    seed: int
    examples_per_id: Mapping[str, float]
    """Of the tables whose recipe follows from it, by name."""

    def check_names(self, tables: Collection[str]) -> None:
        """Raises ValueError if examples are given of a table that is not compressed."""
        unknown = sorted(set(self.examples_per_id) - set(tables))
        if unknown:
            raise ValueError(
                f"examples_per_id has {unknown}, which are not compressed; those that are are "
                f"{sorted(tables)}"
            )


def compressed(
    config: BaseEmbeddingConfig, ratio: float, form: Form, num_rows: int | None = None
) -> tuple[BaseEmbeddingConfig, str]:
    """The CCE form of `config`, or `config` itself and why it stays."""
    chunks = _chunks(config.embedding_dim, form.num_chunks)
    if not chunks:
        return config, f"embedding_dim {config.embedding_dim} is not a multiple of 4"
    names = {field.name for field in fields(EmbeddingBagConfig)}
    kept = {f.name: getattr(config, f.name) for f in fields(config) if f.name in names}
    kept |= {"num_chunks": chunks, "seed": form.seed}
    if config.name in form.examples_per_id:
        kept |= {"recipe": "auto", "examples_per_id": form.examples_per_id[config.name]}
    if has_default_init(config):
        # As a custom one, it would leave the helper rows at zero (CodebookInit).
        kept["init_fn"] = None
    try:
        CCEEmbeddingBagConfig(num_rows=1, **kept)
    except ValueError as error:  # a data type or an option that CCE tables do not have
        return config, str(error)
    if num_rows is not None:
        made = CCEEmbeddingBagConfig(num_rows=num_rows, **kept)
    else:
        rows = max(2, round(config.num_embeddings / ratio))
        made = CCEEmbeddingBagConfig.from_params_per_dim(rows, **kept)
    if made.table_bytes >= full_bytes(config):
        return config, f"compressed it would take {made.table_bytes:,} bytes"
    return made, ""


def _ratio_for(configs: list[BaseEmbeddingConfig], budget: int, form: Form) -> float:
    """The least compression ratio at which the tables fit `budget` bytes."""

    def total(ratio: float) -> int:
        tables = [compressed(c, ratio, form)[0] for c in configs]
        return sum(t.table_bytes if is_cce(t) else full_bytes(t) for t in tables)

    low, high = 1.0, float(max((c.num_embeddings for c in configs), default=1))
    if total(high) > budget:
        raise ValueError(
            f"table_bytes {budget} does not hold the codes of {len(configs)} tables and two rows "
            f"each, which take {total(high)}; use more bytes or fewer chunks"
        )
    # Of the logarithm: the ratio may be of any order of magnitude up to the number of ids.
    for _ in range(60):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if total(middle) <= budget else (middle, high)
    return high


def _describe(
    path: str, config: BaseEmbeddingConfig, table: BaseEmbeddingConfig, reason: str
) -> CompressedTable:
    before = full_bytes(config)
    cce = table if is_cce(table) else None
    return CompressedTable(
        collection=path,
        name=config.name,
        num_embeddings=config.num_embeddings,
        full_bytes=before,
        bytes=cce.table_bytes if cce else before,
        num_rows=cce.num_rows if cce else 0,
        num_helper_rows=cce.helper_rows if cce else 0,
        num_chunks=cce.num_chunks if cce else 0,
        reason=reason,
    )


def _replacement(at: Found, tables: list[BaseEmbeddingConfig]) -> nn.Module:
    """The CCE collection of `tables` for the one that was found.

    Raises:
        ValueError: an optimizer was applied in backward already.
    """
    if any(optimizers_in_backward(p) for p in at.module.parameters()):
        raise ValueError(
            f"{at.path}: an optimizer was applied in backward already; call compress_model first"
        )
    return remade(at.module, tables)
