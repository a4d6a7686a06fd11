"""How many bytes tables take: in training, in a checkpoint, and served."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import nn
from torchrec.distributed.types import ShardedModule
from torchrec.modules.embedding_configs import BaseEmbeddingConfig

from cce_torchrec.codes.chunk_codes import ChunkCodes, codes_of
from cce_torchrec.config import is_cce
from cce_torchrec.inference.packed_tables import check_width
from cce_torchrec.inference.row_types import RowType, row_type
from cce_torchrec.modules.compressible import full_bytes
from cce_torchrec.optimizer_state import KINDS, kind_of
from cce_torchrec.table import Table


@dataclass(frozen=True, kw_only=True)
class TableSizes:
    """Bytes of one table, or of all."""

    name: str
    weights: int
    """Codebooks, or the rows of a plain table, as they are trained."""
    optimizer: int
    """State of FBGEMM's fused optimizer."""
    codes: int
    notes: int
    """Bits of seen ids, and counts of ids."""
    full: int
    """Weights of the same table if it were plain."""
    served_codes: int
    """N x chunks x bits / 8; of a collection 0 before its table was clustered, when codes are
    hashes, and of a configuration what they will be."""
    served_rows: int

    @property
    def training(self) -> int:
        """All that a job keeps of it; a checkpoint has the same tensors."""
        return self.weights + self.optimizer + self.codes + self.notes

    @property
    def serving(self) -> int:
        """`codes.bin` and `rows.bin` of `save_inference`."""
        return self.served_codes + self.served_rows


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What `sizes_of` says; prints as a table."""

    tables: list[TableSizes]
    total: TableSizes

    def __str__(self) -> str:
        columns = ("table", "weights", "optimizer", "codes", "notes", "training, checkpoint",
                   "serving", "full")  # fmt: skip
        lines: list[tuple[str, ...]] = [columns]
        for t in [*self.tables, self.total]:
            numbers = t.weights, t.optimizer, t.codes, t.notes, t.training, t.serving, t.full
            lines.append((t.name, *(f"{n:,}" for n in numbers)))
        widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
        return "\n".join(
            line[0].ljust(widths[0])
            + "".join("  " + cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))
            for line in lines
        )


def sizes_of(
    tables: Sequence[BaseEmbeddingConfig] | nn.Module,
    *,
    optimizer: str | type | None = None,
    data_type: str = "int8",
) -> Sizes:
    """Bytes of `tables`, each and all; of codes, rows and state, not of what surrounds them.

    Args:
        tables: as configured, or a collection, sharded or not, or a model with collections, each of
            which counts once. Tables that were finalized have one row an id; `config.finalized()`
            is what one will be.
        optimizer: class of the fused optimizer, or its name (of torch, TorchRec or FBGEMM:
            "RowWiseAdagrad", "Adam"); None, and SGD, keep no state.
        data_type: of served rows, see `inference_collection`.

    Raises:
        ValueError: an unknown `data_type` or `optimizer`, a width that rows of that type have not,
            an inference collection, whose bytes are in `packed`, a model without collections, or a
            sharded one of TorchRec's own, which does not tell its tables.
    """
    kind = row_type(data_type)
    name = optimizer.__name__ if isinstance(optimizer, type) else optimizer
    if name and not kind_of(name).tensors:
        known = sorted(own.name for own in KINDS)
        raise ValueError(f"optimizer {name!r} is none of {known}, whose state is known")
    if isinstance(tables, nn.Module):
        configs = list(_configs(tables, set()))
    else:
        configs = [(config, None) for config in tables]
    if not configs:
        raise ValueError("there are no tables to count")
    for config, _ in configs:
        check_width(Table(config), kind)
    found = [_sizes(config, own, name or "SGD", kind) for config, own in configs]
    numbers = [field.name for field in fields(TableSizes) if field.name != "name"]
    total = {number: sum(getattr(own, number) for own in found) for number in numbers}
    return Sizes(tables=found, total=TableSizes(name="all", **total))


def _configs(
    module: nn.Module, seen: set[nn.Module]
) -> Iterator[tuple[BaseEmbeddingConfig, ChunkCodes | None]]:
    """Of the outermost collections inside: those within are how a collection keeps its tables."""
    if module in seen:  # by another name
        return
    seen.add(module)
    if hasattr(module, "packed"):
        raise ValueError(f"{type(module).__name__}: bytes are in `packed`; give what was trained")
    for name in ("embedding_bag_configs", "embedding_configs"):
        if hasattr(module, name):
            bags: Any = getattr(module, "bags", module)  # of sequences, their own
            codes = getattr(bags, "codes", nn.ModuleDict())
            for config in getattr(module, name)():
                yield config, codes_of(codes, config.name)
            return
    if isinstance(module, ShardedModule):
        raise ValueError(
            f"a {type(module).__name__} does not tell its tables; give their configurations"
        )
    for child in module.children():
        yield from _configs(child, seen)


def _sizes(
    config: BaseEmbeddingConfig, own: ChunkCodes | None, optimizer: str, kind: RowType
) -> TableSizes:
    ids, dim = config.num_embeddings, config.embedding_dim
    rows, chunks, codes, notes, served_codes = ids, 1, 0, 0, 0
    if is_cce(config):
        rows, chunks = config.rows_per_chunk, config.num_chunks
        codes, notes = config.code_bytes, config.notes_bytes(ids)
        is_hashed = own is not None and not own.num_clusterings
        served_codes = 0 if is_hashed else -(-ids * chunks * config.code_bits // 8)
    # A chunk is a table of its own to FBGEMM, with a number for each of its rows.
    state = kind_of(optimizer).fused_bytes(rows=rows, width=dim, chunk_dim=dim // chunks)
    return TableSizes(
        name=config.name,
        weights=config.codebook_bytes if is_cce(config) else full_bytes(config),
        optimizer=state,
        codes=codes,
        notes=notes,
        full=full_bytes(config),
        served_codes=served_codes,
        served_rows=rows * chunks * kind.row_bytes(dim // chunks),
    )
