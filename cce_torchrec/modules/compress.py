"""Adoption in one call: the large tables of an existing model become CCE tables."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch import nn
from torchrec.modules.embedding_configs import BaseEmbeddingConfig

from cce_torchrec.config import is_cce
from cce_torchrec.config_checks import finite_number
from cce_torchrec.modules.compressed_tables import Form, Made, made_of, ratio_for
from cce_torchrec.modules.compressible import Found, collections_of, full_bytes, remade
from cce_torchrec.table import refuse_none
from cce_torchrec.torchrec_internals import optimizers_in_backward

logger = logging.getLogger(__name__)

_ALREADY = "compressed already"
_FITS = "table_bytes holds all that were chosen in full"


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
    joint: str = ""
    """Name of the table that it is a part of, whose rows these are; empty where it is alone."""


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
                    t.reason or (t.joint and f"in {t.joint!r}"),
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
    joint: str = "no",
    multiplies: bool = False,
    num_chunks: int | None = None,
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
        num_rows: main rows of each table, with 3 times as many helper rows; of a joint one as many
            for each of its tables.
        table_bytes: bytes for all tables that this call compresses, codes counted; each has the
            same part of its own (see `CCEEmbeddingBagConfig.from_bytes`). Where they hold all of
            them in full nothing is compressed.
        examples_per_id: by table, the mean training examples of an id in one pass. Tables that are
            named get the recipe "auto" (see `CCEEmbeddingBagConfig`), others "frequent".
        joint: which tables of a collection become one, whose codebooks their features share (see
            `joint_table`): "no", those of "rare" ids by `examples_per_id`, or "all"; those of one
            embedding_dim, data_type and pooling, whose features no other table reads. The output
            keeps its order. With examples of some of them alone the recipe is "frequent".
        multiplies: whether the network is the product of two embeddings (GMF, two towers): tables
            of `examples_per_id` are then "frequent", however few, and none may be joint.
        num_chunks: most chunks of a table; fewer where embedding_dim asks for it. None: 4, or of
            tables of rare ids within `table_bytes`, which have no codes, 8.
        seed: of the hashes.
        verbose: print the report too, on the first rank.

    Raises:
        ValueError: not one positive budget, unknown table names, tables of modules that are left
            alone, no table chosen where none is compressed already, `table_bytes` too few for two
            rows a table, an optimizer applied already, or a model that is a collection itself.
    """
    refuse_none(tables)
    ratio = _checked_ratio(compression, num_rows, table_bytes)
    finite_number("compress_model", "min_bytes", min_bytes)
    found = collections_of(model)
    chosen = _choose(model, found, tables, min_bytes)
    form = Form(
        num_chunks=num_chunks,
        seed=seed,
        examples_per_id=examples_per_id or {},
        joint=joint,
        multiplies=multiplies,
        count_codes=table_bytes is not None,
    )
    form.check_names({name for _, name in chosen})
    fits = set(chosen) if _holds(table_bytes, chosen.values()) else set()
    if table_bytes is not None and not fits:
        each = [(at.configs, _stay(at, chosen)) for at in found]
        ratio = ratio_for(each, table_bytes, form)
    described: list[CompressedTable] = []
    replacements: dict[nn.Module, nn.Module] = {}
    for at, made in _made(found, set(chosen) - fits, ratio, form, num_rows, fits):
        described += [one for own in made for one in _describe(at.path, own)]
        if any(own.table is not own.of[0] for own in made):
            replacements[at.module] = replacement(at, [own.table for own in made])
    replace_modules(model, replacements)
    report = CompressionReport(described)
    if not replacements:
        _warn(report)
    if verbose:
        _print_on_first_rank(report)
    return report


def _warn(report: CompressionReport) -> None:
    reasons = {f"{table.collection}.{table.name}": table.reason for table in report.tables}
    logger.warning("nothing was compressed, every table stays as it is: %s", reasons)


def _holds(table_bytes: int | None, chosen: Iterable[BaseEmbeddingConfig]) -> bool:
    """Whether so many bytes hold all of the tables in full."""
    return table_bytes is not None and sum(map(full_bytes, chosen)) <= table_bytes


def _print_on_first_rank(report: CompressionReport) -> None:
    if not (dist.is_initialized() and dist.get_rank()):
        print(report)


def _checked_ratio(
    compression: float | None, num_rows: int | None, table_bytes: int | None
) -> float:
    """`compression`, or 1 where another of the three budgets is given."""
    if sum(value is not None for value in (compression, num_rows, table_bytes)) != 1:
        raise ValueError("give exactly one of compression, num_rows and table_bytes")
    ratio = compression if compression is not None else 1.0
    if finite_number("compress_model", "compression", ratio) <= 0:
        raise ValueError(f"compression {ratio} must be positive")
    if table_bytes is not None:
        finite_number("compress_model", "table_bytes", table_bytes)
    return ratio


def replace_modules(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> None:
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
    refuse_itself(model, chosen)
    return chosen


def _refuse_unknown(asked: set[str], names: set[str], left: dict[str, Found]) -> None:
    """Raises for tables that are asked for and cannot be compressed, or that there are not."""
    for name in sorted(asked - names):
        if name in left:
            raise ValueError(f"table {name!r} of {left[name].path!r} stays: {left[name].reason}")
    if asked - names:
        raise ValueError(f"no tables {sorted(asked - names)}; the model has {sorted(names)}")


def refuse_itself(model: nn.Module, chosen: dict[tuple[str, str], BaseEmbeddingConfig]) -> None:
    """Raises where the model itself would have to be replaced."""
    if any(path == "" for path, _ in chosen):
        raise ValueError(
            f"the model is an {type(model).__name__} itself, which cannot be replaced in place; "
            "build its CCE form, or wrap it in a module"
        )


def _made(
    found: Sequence[Found],
    chosen: Collection[tuple[str, str]],
    ratio: float,
    form: Form,
    num_rows: int | None,
    fits: Collection[tuple[str, str]],
) -> Iterator[tuple[Found, list[Made]]]:
    """What becomes of the tables of every collection."""
    # Of the whole model, as plans and `cluster(tables=)` go by names alone.
    names = {config.name for at in found for config in at.configs}
    for at in found:
        stay = _stay(at, chosen)
        stay |= {c.name: _FITS for c in at.configs if (at.path, c.name) in fits}
        made = made_of(at.configs, stay, ratio, form, num_rows, names)
        names |= {own.table.name for own in made}
        yield at, made


def _stay(at: Found, chosen: Collection[tuple[str, str]]) -> dict[str, str]:
    """Why those tables of a collection stay that are not `chosen`, by name."""
    return {
        c.name: at.reason or (_ALREADY if is_cce(c) else "not chosen")
        for c in at.configs
        if (at.path, c.name) not in chosen
    }


def _describe(path: str, made: Made) -> list[CompressedTable]:
    """Each table that became `made`; bytes of a joint one in proportion to their ids."""
    cce = made.table if is_cce(made.table) else None
    out: list[CompressedTable] = []
    ids, rest = sum(config.num_embeddings for config in made.of), cce.table_bytes if cce else 0
    for config in made.of:
        own = full_bytes(config)
        if cce is not None:
            last = config is made.of[-1]
            own = rest if last else cce.table_bytes * config.num_embeddings // ids
            rest -= own
        out.append(
            CompressedTable(
                collection=path,
                name=config.name,
                num_embeddings=config.num_embeddings,
                full_bytes=full_bytes(config),
                bytes=own,
                num_rows=cce.num_rows if cce else 0,
                num_helper_rows=cce.helper_rows if cce else 0,
                num_chunks=cce.num_chunks if cce else 0,
                reason=made.reason,
                joint=made.table.name if len(made.of) > 1 else "",
            )
        )
    return out


def replacement(at: Found, tables: list[BaseEmbeddingConfig]) -> nn.Module:
    """The CCE collection of `tables` for the one that was found.

    Raises:
        ValueError: an optimizer was applied in backward already.
    """
    if any(optimizers_in_backward(p) for p in at.module.parameters()):
        raise ValueError(
            f"{at.path}: an optimizer was applied in backward already; call compress_model first"
        )
    return remade(at.module, tables)
