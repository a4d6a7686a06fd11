"""Plain tables that a checkpoint has under another name than the model.

The same table is called otherwise in TorchRec's collections and in those of CCE tables, so that a
checkpoint from before a collection was replaced has other names of what stays plain in it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from torch.distributed.checkpoint.metadata import Metadata

from cce_torchrec.checkpoint.manifest import CCETableRecord, TableRecord
from cce_torchrec.modules.old_names import new_name, old_names


def renamed_weights(
    saved: Iterable[TableRecord], current: dict[str, TableRecord], keys: set[str]
) -> dict[str, str]:
    """The model's name of a plain table's weight, by each other name that it may have.

    Args:
        saved: the checkpoint's tables.
        current: the model's.
        keys: of the model's state dict.
    """
    out = {}
    for table in saved:
        here = current.get(table.full_name, table)
        if isinstance(table, CCETableRecord) or isinstance(here, CCETableRecord):
            continue
        names = _names(table)
        own = [name for name in names if name in keys]
        out.update({name: own[0] for name in names if own and name not in own})
    return out


def _names(table: TableRecord) -> list[str]:
    prefix = f"{table.collection}." if table.collection else ""
    found = [new_name(prefix, table.name), *old_names(prefix, table.name)]
    # Of sequences, where the collection of bags is inside.
    inner = f"{prefix}bags."
    return [*found, new_name(inner, table.name), *old_names(inner, table.name)]


def with_names(metadata: Metadata, weights: dict[str, str]) -> Metadata:
    """`metadata` with the model's names, of weights and of their optimizer's state.

    Raises:
        ValueError: two names of the checkpoint claim one table.
    """
    if not weights:
        return metadata

    def of_model(key: str) -> str:
        for old, new in weights.items():
            for kind in ("model", "optimizer"):
                if f"{key}.".startswith(f"{kind}.{old}."):
                    return key.replace(old, new, 1)
        return key

    entries = metadata.state_dict_metadata
    for key in entries:
        if (name := of_model(key)) != key and name in entries:
            raise ValueError(f"{key!r} and {name!r} of the checkpoint are one table of the model")
    return replace(
        metadata,
        state_dict_metadata={of_model(key): value for key, value in entries.items()},
        storage_data={
            replace(at, fqn=of_model(at.fqn)): value for at, value in metadata.storage_data.items()
        },
    )
