"""Whether what is saved is finite, so that a run that diverged pushes no good checkpoint out."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cce_torchrec.checkpoint.manifest import TableRecord
from cce_torchrec.checkpoint.tables import table_of
from cce_torchrec.checkpoint.tensor_files import Shard


def refuse_not_finite(
    shards: Sequence[Shard], exempt: set[str], tables: dict[str, TableRecord]
) -> None:
    """Raises where a parameter or its optimizer's state has NaN or infinite values.

    Raises:
        ValueError: naming each table and each other tensor.
    """
    found = {shard.key: None for shard in shards
             if shard.key not in exempt and not is_finite(shard.tensor)}  # fmt: skip
    if found:
        names = []
        for key in found:
            kind, _, name = key.partition(".")
            table = table_of(name, tables)
            names.append(f"table {table!r} ({kind} {name})" if table else f"{kind} {name}")
        raise ValueError(
            f"{', '.join(names[:3])}{' and more' if len(names) > 3 else ''}: NaN or infinite "
            "values; nothing was saved and no checkpoint removed; load the latest checkpoint, or "
            "pass check_finite=False"
        )


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all values are finite."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    if tensor.element_size() == 1:  # float8, of which torch has no sums
        tensor = tensor.float()
    # One pass and no memory: a sum is not finite if a value is not. It may also overflow.
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())
