"""Readers of data sets for the training program and the benchmarks; even numbers of batches.

Names are loaded when they are asked for: options of a table need neither torch nor pyarrow.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what `__getattr__` finds, for type checkers and editors
    from cce_torchrec.data.by_name import load
    from cce_torchrec.data.dataset import Bags, Dataset, Examples, Rows, Share
    from cce_torchrec.data.even import even_batches
    from cce_torchrec.data.table import TableDataset
    from cce_torchrec.data.table_options import TableOptions

_MODULE_OF = {
    "Bags": "dataset",
    "Dataset": "dataset",
    "Examples": "dataset",
    "Rows": "dataset",
    "Share": "dataset",
    "TableDataset": "table",
    "TableOptions": "table_options",
    "even_batches": "even",
    "load": "by_name",
}

__all__ = [
    "Bags",
    "Dataset",
    "Examples",
    "Rows",
    "Share",
    "TableDataset",
    "TableOptions",
    "even_batches",
    "load",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
