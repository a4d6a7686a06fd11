"""The compressed forms of tables, each by itself or several as one, and the ratio for a budget."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from torchrec.modules.embedding_configs import BaseEmbeddingConfig, EmbeddingBagConfig

from cce_torchrec.config import CCEEmbeddingBagConfig, is_cce
from cce_torchrec.config_checks import check_examples, whole_number
from cce_torchrec.joint import free_name, has_default_init, joint_table, shape_of
from cce_torchrec.modules.compressible import full_bytes
from cce_torchrec.recipe import RARE_BELOW, is_rare, recipe_fields, trains_rare
from cce_torchrec.sizing import BYTES_CHUNKS, PARAMS_CHUNKS

JOINT = ("no", "rare", "all")
"""Which compressed tables are one."""


@dataclass(frozen=True, kw_only=True)
class Form:
    """What compressed tables have in common."""

    num_chunks: int | None
    """At most; None: 8 of a table of rare ids within a budget of bytes, and 4 of others."""
    seed: int
    examples_per_id: Mapping[str, float]
    """Of the tables whose recipe follows from it, by name."""
    joint: str = "no"
    """One of `JOINT`."""
    multiplies: bool = False
    """Whether the network multiplies the embeddings of two features, and does nothing else."""
    count_codes: bool = False
    """Whether codes have to leave most of the bytes to codebooks."""

    def __post_init__(self) -> None:
        if not isinstance(self.examples_per_id, Mapping):
            raise ValueError(
                f"examples_per_id {self.examples_per_id!r} is no mapping; give examples by table"
            )
        for name, examples in self.examples_per_id.items():
            check_examples(f"table {name!r}", examples)
        chunks = self.num_chunks
        if chunks is not None and whole_number("compressed tables", "num_chunks", chunks) < 1:
            raise ValueError(f"num_chunks {self.num_chunks} must be 1 or more")
        if self.joint not in JOINT:
            raise ValueError(f"joint {self.joint!r} is none of {list(JOINT)}")
        if self.multiplies and self.joint != "no":
            raise ValueError(
                f"joint={self.joint!r} and multiplies=True: a row that both embeddings share would "
                "be multiplied by itself; leave joint out"
            )
        if self.joint == "rare" and not self.examples_per_id:
            raise ValueError(
                "joint='rare' goes by the examples of an id; give examples_per_id, by table, or "
                "joint='all'"
            )

    def check_names(self, tables: Collection[str]) -> None:
        """Raises ValueError if examples are given of a table that is not compressed."""
        unknown = sorted(set(self.examples_per_id) - set(tables))
        if unknown:
            raise ValueError(
                f"examples_per_id has {unknown}, which are not compressed; those that are are "
                f"{sorted(tables)}"
            )

    def joins(self, table: BaseEmbeddingConfig) -> bool:
        """Whether `table` may be one of several that are one."""
        examples = self.examples_per_id.get(table.name, RARE_BELOW)
        return self.joint == "all" or (self.joint == "rare" and is_rare(examples))


@dataclass(frozen=True, kw_only=True)
class Made:
    """One table of a collection as it becomes."""

    table: BaseEmbeddingConfig
    of: list[BaseEmbeddingConfig]
    """What it replaces: itself, or several that it joins."""
    reason: str = ""
    """Why it stays as it was; empty where it is compressed."""


def made_of(
    tables: Sequence[BaseEmbeddingConfig],
    stay: Mapping[str, str],
    ratio: float,
    form: Form,
    num_rows: int | None = None,
    taken: Collection[str] = (),
) -> list[Made]:
    """What becomes of the tables of one collection, in their order, a joint one at its first.

    Args:
        tables: of the collection.
        stay: why those stay that are not to be compressed, by name.
        ratio: full over compressed rows.
        form: of those that are compressed.
        num_rows: main rows of a table, in place of `ratio`; of a joint one as many for each of its.
        taken: names that a joint table may not have, beside those of `tables`.
    """
    groups: dict[str, list[BaseEmbeddingConfig]] = {}
    for table in tables:
        if table.name not in stay:
            groups.setdefault(_group(table, tables, form), []).append(table)
    # Names of the members too: a joint table called like one of them would be taken for it.
    used, out = {*taken, *(table.name for table in tables)}, []
    for table in tables:
        if table.name in stay:
            out.append(Made(table=table, of=[table], reason=stay[table.name]))
            continue
        group = groups[_group(table, tables, form)]
        if len(group) == 1:
            out.append(_alone(table, ratio, form, num_rows))
        elif table is group[0]:
            joint = _joined(group, ratio, form, num_rows, free_name(used))
            used |= {one.table.name for one in joint}
            out += joint
    return out


def _group(table: BaseEmbeddingConfig, tables: Sequence[BaseEmbeddingConfig], form: Form) -> str:
    """Tables of one group become one."""
    others = {f for t in tables if t is not table for f in t.feature_names or [t.name]}
    # A feature of two tables would be called by the joint one's name in the output.
    alone = others.intersection(table.feature_names or [table.name])
    if alone or not has_default_init(table) or _fault(table, form) or not form.joins(table):
        return table.name
    return f"joint: {shape_of(table)}"


def _alone(table: BaseEmbeddingConfig, ratio: float, form: Form, num_rows: int | None) -> Made:
    config, reason = compressed(table, ratio, form, num_rows)
    return Made(table=config, of=[table], reason=reason)


def _joined(
    group: list[BaseEmbeddingConfig], ratio: float, form: Form, num_rows: int | None, name: str
) -> list[Made]:
    """One table for all of `group`; each by itself, where it would not be smaller."""
    fields = joint_table(group, name)
    own_ids = {name: fields.pop(name) for name in ("id_ranges", "rotate_chunks")}
    known = [t for t in group if t.name in form.examples_per_id]
    examples = {}
    # Where some are not known the mean is not either, and the recipe stays "frequent".
    if len(known) == len(group):
        seen = sum(form.examples_per_id[t.name] * t.num_embeddings for t in group)
        examples[name] = seen / fields["num_embeddings"]
    rows = None if num_rows is None else num_rows * len(group)
    own = replace(form, examples_per_id=examples, joint="no")
    config, reason = compressed(EmbeddingBagConfig(**fields), ratio, own, rows, own_ids)
    # Small tables among large ones may well be smaller alone.
    if reason:
        return [_alone(table, ratio, form, num_rows) for table in group]
    return [Made(table=config, of=group)]


def _chunks(dim: int, most: int) -> int:
    """The largest number of chunks up to `most` whose width is a multiple of 4, as `dim` is."""
    return next(c for c in range(most, 0, -1) if dim % (4 * c) == 0)


def compressed(
    config: BaseEmbeddingConfig,
    ratio: float,
    form: Form,
    num_rows: int | None = None,
    own_ids: Mapping[str, Any] | None = None,
) -> tuple[BaseEmbeddingConfig, str]:
    """The CCE form of `config`, or `config` itself and why it stays.

    Args:
        own_ids: fields of a joint table, that TorchRec's configurations do not have.
    """
    fault = _fault(config, form)
    if fault:
        return config, fault
    kept = _kept(config, form) | dict(own_ids or {})
    if num_rows is not None:
        made = CCEEmbeddingBagConfig(num_rows=num_rows, **kept)
    else:
        made = _of_ratio(config, ratio, form.count_codes, kept)
    if made.table_bytes >= full_bytes(config):
        return config, f"compressed it would take {made.table_bytes:,} bytes"
    return made, ""


def _of_ratio(
    config: BaseEmbeddingConfig, ratio: float, count_codes: bool, kept: dict[str, Any]
) -> CCEEmbeddingBagConfig:
    """A table of fewer parameters by `ratio`, or with `count_codes` of fewer bytes."""
    if count_codes:
        try:
            return CCEEmbeddingBagConfig.from_bytes(int(full_bytes(config) / ratio), **kept)
        except ValueError:  # no two rows, which are the least that there are
            return CCEEmbeddingBagConfig.from_params_per_dim(2, **kept)
    rows = max(2, round(config.num_embeddings / ratio))
    return CCEEmbeddingBagConfig.from_params_per_dim(rows, **kept)


def _fault(config: BaseEmbeddingConfig, form: Form) -> str:
    """Why `config` has no CCE form; empty if it has one."""
    if config.embedding_dim % 4:
        return f"embedding_dim {config.embedding_dim} is not a multiple of 4"
    try:
        CCEEmbeddingBagConfig(num_rows=1, **_kept(config, form))
    except ValueError as error:  # a data type or an option that CCE tables do not have
        return str(error)
    return ""


def _kept(config: BaseEmbeddingConfig, form: Form) -> dict[str, Any]:
    """What a CCE table has of `config`, and of `form`."""
    names = {field.name for field in fields(EmbeddingBagConfig)}
    kept = {f.name: getattr(config, f.name) for f in fields(config) if f.name in names}
    kept["seed"] = form.seed
    if config.name in form.examples_per_id:
        kept |= recipe_fields(form.examples_per_id[config.name], multiplies=form.multiplies)
    most = form.num_chunks
    if most is None:
        # By a ratio of parameters rare ids have codes too, whose bytes are what a user sees.
        no_codes = form.count_codes and trains_rare(kept)
        most = PARAMS_CHUNKS if no_codes else BYTES_CHUNKS
    kept["num_chunks"] = _chunks(config.embedding_dim, most)
    if has_default_init(config):
        # As a custom one, it would leave the helper rows at zero (CodebookInit).
        kept["init_fn"] = None
    return kept


def ratio_for(
    collections: Sequence[tuple[Sequence[BaseEmbeddingConfig], Mapping[str, str]]],
    budget: int,
    form: Form,
) -> float:
    """The least compression ratio at which tables fit `budget` bytes.

    Args:
        collections: tables of each, and why those stay that do not count.
        budget: of all others.
        form: of those that are compressed.
    """

    def total(ratio: float) -> int:
        every = [(m, s) for tables, s in collections for m in made_of(tables, s, ratio, form)]
        made = [one.table for one, stay in every if one.of[0].name not in stay]
        return sum(t.table_bytes if is_cce(t) else full_bytes(t) for t in made)

    counted = [t for tables, stay in collections for t in tables if t.name not in stay]
    low, high = 1.0, float(max(1, sum(t.num_embeddings for t in counted)))
    if total(high) > budget:
        whole = [f"{t.name!r} ({why})" for t in counted if (why := _fault(t, form))]
        raise ValueError(
            f"table_bytes {budget} does not hold two rows of each of {len(counted)} tables, which "
            f"take {total(high)}; use more bytes"
            + (f". Some cannot be compressed: {', '.join(whole)}" if whole else "")
        )
    # Of the logarithm: the ratio may be of any order of magnitude up to the number of ids.
    for _ in range(60):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if total(middle) <= budget else (middle, high)
    return high
