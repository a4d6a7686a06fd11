"""Adoption in one call: the large tables of an existing model become CCE tables."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torchrec.modules.embedding_configs import (
    BaseEmbeddingConfig,
    EmbeddingBagConfig,
    data_type_to_dtype,
)
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from cce_torchrec.config import CCEEmbeddingBagConfig, is_cce
from cce_torchrec.modules.embedding_bag_collection import CCEEmbeddingBagCollection
from cce_torchrec.table import refuse_none
from cce_torchrec.torchrec_internals import optimizers_in_backward

logger = logging.getLogger(__name__)

_SEQUENCE = "in an EmbeddingCollection, which stays: build a CCEEmbeddingCollection in its place"


@dataclass(frozen=True, kw_only=True)
class CompressedTable:
    """What `compress_model` did to one table."""

    collection: str
    """Path of its collection in the model."""
    name: str
    num_embeddings: int
    full_bytes: int
    bytes: int
    num_rows: int
    """0 where the table stayed full."""
    num_helper_rows: int
    num_chunks: int
    reason: str
    """Why the table stayed full; empty where it was compressed."""


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
    num_chunks: int = 4,
    seed: int = 0,
    verbose: bool = True,
) -> CompressionReport:
    """Replaces, in place, every EmbeddingBagCollection of `model` that has tables to compress.

    Call it before optimizers are applied and the model is sharded. Compressed tables start fresh,
    others keep their weights; those that would not shrink stay full, and the report says why. So
    do all of an EmbeddingCollection.

    Args:
        tables: names of the tables to compress; None compresses all of at least `min_bytes`.
        min_bytes: bytes from which a table is compressed if none are named.
        compression: full over compressed parameters of each table. One of the three budgets.
        num_rows: main rows of each table, with 3 times as many helper rows.
        table_bytes: bytes for all compressed tables together, codes counted; one compression
            ratio is found for all of them.
        num_chunks: most chunks of a table; fewer where embedding_dim asks for it.
        seed: of the hashes.
        verbose: print the report too, on the first rank.

    Raises:
        ValueError: not one positive budget, unknown table names, no table chosen, `table_bytes` too
            few for the codes, an optimizer applied already, or a model that is a collection itself.
    """
    refuse_none(tables)
    ratio = _checked_ratio(compression, num_rows, table_bytes, num_chunks)
    found = [(p, m) for p, m in model.named_modules() if type(m) is EmbeddingBagCollection]
    sequences = _sequences(model)
    chosen = _choose(model, found, [config.name for _, config in sequences], tables, min_bytes)
    picked = [c for path, m in found for c in m.embedding_bag_configs() if (path, c.name) in chosen]
    if table_bytes is not None:
        ratio = _ratio_for(picked, table_bytes, num_chunks, seed)
    made: list[CompressedTable] = []
    replacements: dict[nn.Module, nn.Module] = {}
    for path, module in found:
        new: list[EmbeddingBagConfig] = []
        for config in module.embedding_bag_configs():
            table, reason = config, "not chosen"
            if (path, config.name) in chosen:
                table, reason = compressed(config, ratio, num_rows, num_chunks, seed)
            new.append(table)
            made.append(_describe(path, config, table, reason))
        if any(is_cce(table) for table in new):
            replacements[module] = _replacement(path, module, new)
    _replace(model, replacements)
    report = _report(made, sequences)
    if verbose and not (dist.is_initialized() and dist.get_rank()):
        print(report)
    return report


def _report(
    made: list[CompressedTable], sequences: list[tuple[str, BaseEmbeddingConfig]]
) -> CompressionReport:
    """The report of all tables; says so where none of them was compressed."""
    made = made + [_describe(path, config, config, _SEQUENCE) for path, config in sequences]
    if not any(table.num_rows for table in made):
        reasons = {f"{table.collection}.{table.name}": table.reason for table in made}
        logger.warning("nothing was compressed, every table stays full: %s", reasons)
    return CompressionReport(made)


def _sequences(model: nn.Module) -> list[tuple[str, BaseEmbeddingConfig]]:
    """Path of the collection and configuration of each table of TorchRec's EmbeddingCollections."""
    return [
        (path, config)
        for path, module in model.named_modules()
        if type(module) is EmbeddingCollection
        for config in module.embedding_configs()
    ]


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


def full_bytes(config: BaseEmbeddingConfig) -> int:
    """Bytes of the weights of a plain table."""
    itemsize = data_type_to_dtype(config.data_type).itemsize
    return config.num_embeddings * config.embedding_dim * itemsize


def _choose(
    model: nn.Module,
    found: list[tuple[str, EmbeddingBagCollection]],
    sequences: list[str],
    tables: Sequence[str] | None,
    min_bytes: int,
) -> set[tuple[str, str]]:
    """Path of the collection and name of each table to compress.

    Raises:
        ValueError: unknown names, none at all, or a collection that cannot be replaced.
    """
    every = {(path, c.name): c for path, module in found for c in module.embedding_bag_configs()}
    unknown = sorted(set(tables or ()) - {name for _, name in every})
    for name in unknown:
        if name in sequences:
            raise ValueError(f"table {name!r} is {_SEQUENCE}")
    if unknown:
        raise ValueError(f"no tables {unknown}; the model has {sorted({n for _, n in every})}")
    chosen = {
        key
        for key, config in every.items()
        if (full_bytes(config) >= min_bytes if tables is None else key[1] in tables)
    }
    if not chosen:
        raise ValueError(
            f"nothing to compress: no EmbeddingBagCollection inside {type(model).__name__} has "
            f"a table of {min_bytes} bytes or more; lower min_bytes or name tables"
            + (f"; tables {sequences} are {_SEQUENCE}" if sequences else "")
        )
    if any(path == "" for path, _ in chosen):
        raise ValueError(
            "the model is an EmbeddingBagCollection itself, which cannot be replaced in place; "
            "build a CCEEmbeddingBagCollection, or wrap it in a module"
        )
    return chosen


def _chunks(dim: int, most: int) -> int:
    """The largest number of chunks up to `most` whose width is a multiple of 4; 0 if none is."""
    return next((c for c in range(most, 0, -1) if dim % (4 * c) == 0), 0)


def compressed(
    config: EmbeddingBagConfig, ratio: float, num_rows: int | None, num_chunks: int, seed: int
) -> tuple[EmbeddingBagConfig, str]:
    """The CCE form of `config`, or `config` itself and why it stays."""
    chunks = _chunks(config.embedding_dim, num_chunks)
    if not chunks:
        return config, f"embedding_dim {config.embedding_dim} is not a multiple of 4"
    kept = {field.name: getattr(config, field.name) for field in fields(EmbeddingBagConfig)}
    kept |= {"num_chunks": chunks, "seed": seed}
    if _is_default_init(config):
        # As a custom one, it would leave the helper rows at zero (CodebookInit).
        kept["init_fn"] = None
    if num_rows is not None:
        made = CCEEmbeddingBagConfig(num_rows=num_rows, **kept)
    else:
        rows = max(2, round(config.num_embeddings / ratio))
        made = CCEEmbeddingBagConfig.from_params_per_dim(rows, **kept)
    if made.table_bytes >= full_bytes(config):
        return config, f"compressed it would take {made.table_bytes:,} bytes"
    return made, ""


def _is_default_init(config: EmbeddingBagConfig) -> bool:
    """Whether `init_fn` is what TorchRec fills in: uniform between the config's bounds."""
    low, high = config.get_weight_init_min(), config.get_weight_init_max()
    return (
        isinstance(config.init_fn, partial)
        and config.init_fn.func is torch.nn.init.uniform_
        and config.init_fn.keywords == {"a": low, "b": high}
    )


def _ratio_for(configs: list[EmbeddingBagConfig], budget: int, num_chunks: int, seed: int) -> float:
    """The least compression ratio at which the tables fit `budget` bytes."""

    def total(ratio: float) -> int:
        tables = [compressed(c, ratio, None, num_chunks, seed)[0] for c in configs]
        return sum(t.table_bytes if is_cce(t) else full_bytes(t) for t in tables)

    low, high = 1.0, float(max(c.num_embeddings for c in configs))
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


def _replacement(
    path: str, module: EmbeddingBagCollection, tables: list[EmbeddingBagConfig]
) -> CCEEmbeddingBagCollection:
    if any(optimizers_in_backward(p) for p in module.parameters()):
        raise ValueError(
            f"{path}: an optimizer was applied in backward already; call compress_model first"
        )
    made = CCEEmbeddingBagCollection(tables, device=module.device, is_weighted=module.is_weighted())
    if module.device.type != "meta":
        with torch.no_grad():
            for table in tables:
                if not is_cce(table):
                    own = made.embedding_bag_collection.embedding_bags[table.name]
                    given = module.embedding_bags[table.name].weight
                    own.weight.copy_(given).requires_grad_(given.requires_grad)
    return made.train(module.training)
