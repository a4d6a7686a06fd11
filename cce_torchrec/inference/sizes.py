"""How many bytes tables take: in training, in a checkpoint, and served."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

from torch import nn
from torchrec.distributed.types import ShardedModule
from torchrec.modules.embedding_configs import BaseEmbeddingConfig

from cce_torchrec.config import is_cce
from cce_torchrec.inference.row_types import RowType, row_type
from cce_torchrec.modules.compressible import full_bytes
from cce_torchrec.optimizer_state import kind_of


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
    """N x chunks x bits / 8, once the table was clustered; before, codes are hashes."""
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
        tables: as configured, or a collection, sharded or not, or a model with collections. Tables
            that were finalized have one row an id; `config.finalized()` is what one will be.
        optimizer: class of the fused optimizer, or its name ("RowWiseAdagrad", "Adam"); None, and
            SGD, keep no state.
        data_type: of served rows, see `inference_collection`.

    Raises:
        ValueError: an unknown `data_type` or `optimizer`, a model without collections, or a sharded
            one of TorchRec's own, which does not tell its tables.
    """
    kind = row_type(data_type)
    name = optimizer.__name__ if isinstance(optimizer, type) else optimizer
    if name and not kind_of(name).tensors:
        raise ValueError(f"optimizer {name!r} is none whose state is known; name SGD to count none")
    configs = list(_configs(tables)) if isinstance(tables, nn.Module) else list(tables)
    if not configs:
        raise ValueError("there are no tables to count")
    found = [_sizes(config, name or "SGD", kind) for config in configs]
    numbers = [field.name for field in fields(TableSizes) if field.name != "name"]
    total = {number: sum(getattr(own, number) for own in found) for number in numbers}
    return Sizes(tables=found, total=TableSizes(name="all", **total))


def _configs(module: nn.Module) -> Iterator[BaseEmbeddingConfig]:
    """Of the outermost collections inside: those within are how a collection keeps its tables."""
    for name in ("embedding_bag_configs", "embedding_configs"):
        if hasattr(module, name):
            yield from getattr(module, name)()
            return
    if isinstance(module, ShardedModule):
        raise ValueError(
            f"a {type(module).__name__} does not tell its tables; give their configurations"
        )
    for child in module.children():
        yield from _configs(child)


def _sizes(config: BaseEmbeddingConfig, optimizer: str, kind: RowType) -> TableSizes:
    ids, dim = config.num_embeddings, config.embedding_dim
    rows, chunks, codes, notes, served_codes = ids, 1, 0, 0, 0
    if is_cce(config):
        rows, chunks = config.rows_per_chunk, config.num_chunks
        codes, notes = config.code_bytes, config.notes_bytes(ids)
        served_codes = -(-ids * chunks * config.code_bits // 8)
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
