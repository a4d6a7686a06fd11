"""What health is computed from: counts of codes and sums of rows, by whoever has a part of a table.

A rank has some shards of a table, and a reader of a checkpoint has blocks of it one after the
other. Both make the same small numbers of their parts, which are then put together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from cce_torchrec.checkpoint.manifest import CCETableRecord, TableRecord
from cce_torchrec.checkpoint.tables import table_of
from cce_torchrec.codes.hashing import code_hash, helper_hash, mix
from cce_torchrec.codes.whole_codes import rows_of
from cce_torchrec.packing import CodePacking

SAMPLE = 1 << 20
"""Most rows of a tensor whose sums are kept; of larger ones every m-th row's."""
_BLOCK = 1 << 20
"""Ids, or values, that are looked at at once."""

Offsets = tuple[int, ...]
Block = tuple[Offsets, torch.Tensor]


class Tensors(Protocol):
    """Tensors of a model or a checkpoint, some parts of which are here."""

    def shape_of(self, key: str) -> tuple[int, ...]:
        """Of the whole tensor."""
        ...

    def blocks_of(self, key: str) -> Iterable[Block]:
        """Offsets in the whole and values of the parts that are here."""
        ...


class Usage(NamedTuple):
    """How many ids read each row of a chunk, int64."""

    main: np.ndarray[Any, Any]
    helper: np.ndarray[Any, Any]


class Role(NamedTuple):
    """What a tensor is to its table."""

    chunk: int | None
    """None of a plain table."""
    state: str
    """Name of the optimizer state, "" of the rows themselves."""


@dataclass
class RowSums:
    """Of each row of a tensor, or of every m-th: a sum over its columns."""

    shape: tuple[int, ...]
    parts: dict[Offsets, np.ndarray[Any, Any]] = field(default_factory=dict)
    """By the place in the tensor, so that copies of one part on several ranks count once."""
    not_finite: dict[Offsets, int] = field(default_factory=dict)
    """Values that are NaN or infinite, of all rows."""

    @property
    def stride(self) -> int:
        """Rows of which one is looked at."""
        return max(1, -(-self.shape[0] // SAMPLE))

    @property
    def columns(self) -> int:
        """Values of a row."""
        return self.shape[1] if len(self.shape) > 1 else 1

    def add(self, offsets: Offsets, block: torch.Tensor, *, squares: bool) -> None:
        """Adds a part: the squares of a row's values are summed up, or their absolute values."""
        skipped, sums, bad = -offsets[0] % self.stride, [], 0
        rows = block.detach().reshape(len(block), -1)
        step = max(1, _BLOCK // max(1, rows.shape[1]) // self.stride) * self.stride
        for first in range(0, len(rows), step):
            part = rows[first : first + step].cpu()
            # A sum is not finite if a value is not, and costs one pass and no memory.
            if not bool(part.float().sum().isfinite()):
                bad += int((~part.float().isfinite()).sum())
            taken = part[skipped :: self.stride].double()
            sums.append((taken.square() if squares else taken.abs()).sum(1))
        self.parts[offsets] = torch.cat(sums).numpy() if sums else np.zeros(0)
        self.not_finite[offsets] = bad

    def merge(self, other: RowSums) -> None:
        """Takes the parts of another rank."""
        self.parts |= other.parts
        self.not_finite |= other.not_finite

    def total(self) -> np.ndarray[Any, Any]:
        """A row's sum over all parts, float64 [rows looked at]."""
        out = np.zeros(-(-self.shape[0] // self.stride))
        for offsets in sorted(self.parts):
            first, part = -(-offsets[0] // self.stride), self.parts[offsets]
            out[first : first + len(part)] += part
        return out


@dataclass
class Parts:
    """What a rank, or a reader, has found of one table."""

    usage: dict[tuple[int, int], Usage] = field(default_factory=dict)
    """By chunk and first id of those here, so that copies on several ranks count once."""
    rows: dict[Role, RowSums] = field(default_factory=dict)
    clusterings: int = 0
    types: dict[Role, str] = field(default_factory=dict)
    """torch's names of types."""

    def merge(self, other: Parts) -> None:
        """Takes what another rank has found."""
        self.usage |= other.usage
        self.types |= other.types
        self.clusterings = max(self.clusterings, other.clusterings)
        for role, sums in other.rows.items():
            self.rows.setdefault(role, RowSums(sums.shape)).merge(sums)


def keys_of(keys: Iterable[str], tables: dict[str, TableRecord]) -> dict[str, list[str]]:
    """The keys of a state that belong to each table, by its full name."""
    out: dict[str, list[str]] = {name: [] for name in tables}
    for key in keys:
        name = table_of(key.partition(".")[2], tables)
        if name is not None:
            out[name].append(key)
    return out


def role_of(key: str) -> Role | None:
    """What the tensor `key` of a table is to it; None of codes, hashes and notes."""
    kind, _, name = key.partition(".")
    parameter, state = (name, "") if kind == "model" else name.rsplit(".", 1)
    if not parameter.endswith(".weight"):
        return None
    physical = parameter.removesuffix(".weight").rpartition(".")[2]
    # No table of a user has a # in its name.
    chunk = physical.partition("#")[2]
    return Role(int(chunk) if chunk else None, state)


def measure(
    table: TableRecord, keys: Iterable[str], tensors: Tensors, *, first: bool, whole_codes: bool
) -> Parts:
    """What the parts of `table` that are here come to.

    Args:
        table: as it is now.
        keys: of its tensors.
        tensors: where their parts are.
        first: whether this is the rank that looks at what no rank has, codes that are hashes.
        whole_codes: codes are whole integers, as in checkpoints before format 4.
    """
    out, codes = Parts(), None
    for key in keys:
        role = role_of(key)
        if key.endswith(f"codes.{table.name}.clusterings"):
            out.clusterings = max([0, *(int(part) for _, part in tensors.blocks_of(key))])
        elif key.endswith(f"codes.{table.name}.codes"):
            codes = key
        elif role is not None and tensors.shape_of(key):  # a count of steps has no rows
            sums = out.rows[role] = RowSums(tensors.shape_of(key))
            for offsets, block in tensors.blocks_of(key):
                sums.add(offsets, block, squares=not role.state)
                out.types[role] = str(block.dtype).removeprefix("torch.")
    if not isinstance(table, CCETableRecord):
        return out
    if codes is None:
        if first:
            _count_hashed(table, out)
        return out
    for offsets, block in tensors.blocks_of(codes):
        if block.numel():
            _count(table, out, offsets, block, whole=whole_codes)
    return out


def packing_of(table: CCETableRecord) -> CodePacking:
    """How the codes of a table lie."""
    return CodePacking.of_rows(table.num_rows if table.learned_codes else 1)


def _count(
    table: CCETableRecord, out: Parts, offsets: Offsets, block: torch.Tensor, *, whole: bool
) -> None:
    """Adds the usage of a block of codes, packed or whole ones."""
    packing = packing_of(table)
    first_id, first_chunk = offsets
    if not whole:
        first_id, first_chunk = first_id * packing.group, first_chunk // packing.width
    ids = min(len(block) * (1 if whole else packing.group), table.num_embeddings - first_id)
    columns = block.shape[1] // (1 if whole else packing.width)

    def codes(first: int, last: int) -> torch.Tensor:
        if whole:
            return rows_of(block[first:last].cpu())
        rows = block[first // packing.group : packing.rows(last)]
        return packing.unpack(rows.cpu(), last - first)

    own = range(first_id, first_id + ids)
    chunks = range(first_chunk, first_chunk + columns)
    _count_ids(table, out, own, chunks, codes)


def _count_hashed(table: CCETableRecord, out: Parts) -> None:
    """Adds the usage of codes that are not kept: hashes, or all 0."""
    chunks = range(table.num_chunks)
    hashes = [code_hash(table.seed, table.name, chunk) for chunk in chunks]

    def codes(first: int, last: int) -> torch.Tensor:
        mixed = mix(torch.arange(first, last, device="cpu"))
        return torch.stack([hash_.of_mixed(mixed, table.num_rows) for hash_ in hashes], 1)

    _count_ids(table, out, range(table.num_embeddings), chunks, codes)


def _count_ids(
    table: CCETableRecord,
    out: Parts,
    ids: range,
    chunks: range,
    codes: Callable[[int, int], torch.Tensor],
) -> None:
    """Adds what `codes(first, last)`, counted from the first of `ids`, and their hashes address.

    Codes [last - first, chunks] are int64. `out` has the number of clusterings, by which ids are
    hashed.
    """
    # As the lookup hashes: by the number of clusterings so far.
    helpers = [helper_hash(table.seed, table.name, chunk, out.clusterings) for chunk in chunks]
    # A job may have another default device.
    main, helper = (
        torch.zeros(len(chunks), rows, dtype=torch.int64, device="cpu")
        for rows in (table.num_rows, table.num_helper_rows)
    )
    for first, last in _ranges(len(ids)):
        block = codes(first, last)
        # A wrong code would otherwise be counted as a row of the helper, or fail without a word.
        if int(block.max()) >= table.num_rows:
            raise ValueError(
                f"table {table.name!r} has the code {int(block.max())}, and {table.num_rows} rows; "
                "the codes are damaged"
            )
        mixed = mix(torch.arange(ids.start + first, ids.start + last, device="cpu"))
        for column in range(len(chunks)):
            main[column] += torch.bincount(block[:, column], minlength=table.num_rows)
            if table.num_helper_rows:
                rows = helpers[column].of_mixed(mixed, table.num_helper_rows)
                helper[column] += torch.bincount(rows, minlength=table.num_helper_rows)
    starts = dict(out.usage.keys())  # which are pairs
    for column, chunk in enumerate(chunks):
        # Blocks of this rank are one part, whose first id names it.
        place = starts.get(chunk, ids.start)
        before = out.usage.get((chunk, place), Usage(np.zeros(1, np.int64), np.zeros(1, np.int64)))
        found = main[column].numpy(), helper[column].numpy()
        out.usage[chunk, place] = Usage(before.main + found[0], before.helper + found[1])


def _ranges(count: int) -> Iterator[tuple[int, int]]:
    for first in range(0, count, _BLOCK):
        yield first, min(count, first + _BLOCK)
