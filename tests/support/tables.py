"""Small tables in files, as users have them, with a plain reading of them beside."""

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

COLUMNS = ["click", "price", "age", "user", "item", "tags", "words"]
OPTIONS = dict(
    label="click", dense=("price", "age"), categorical=("user", "item"), sequences=("tags", "words")
)
"""Options of `TableOptions` for `frame`, all of whose columns parquet has."""
FLAT = {**OPTIONS, "sequences": ()}
"""Those that text files have, too."""


def frame(num_rows=1000, seed=0):
    """Rows whose `user` is their number, so that a test can tell which they are."""
    random = np.random.default_rng(seed)
    tags = [random.integers(0, 50, n).tolist() for n in random.integers(0, 4, num_rows)]
    return pd.DataFrame(
        {
            "click": random.integers(0, 2, num_rows),
            "price": np.where(random.random(num_rows) < 0.1, np.nan, random.normal(5, 2, num_rows)),
            "age": random.integers(0, 90, num_rows),
            "user": np.arange(num_rows),
            "item": [f"item {i}" for i in random.integers(0, 40, num_rows)],
            "tags": tags,
            "words": [[f"w{tag}" for tag in row] for row in tags],
        }
    )


def write_parquet(path, rows, row_group_size=100):
    """`rows` as a parquet file of several row groups."""
    pq.write_table(pa.Table.from_pandas(rows), path, row_group_size=row_group_size)
    return path


def write_csv(path, rows):
    """The columns of `rows` that are no lists, as a text file with a header."""
    separator = "," if Path(path).suffix == ".csv" else "\t"
    rows.drop(columns=["tags", "words"]).to_csv(path, index=False, sep=separator)
    return path


def write_criteo(path, num_rows=300, seed=0):
    """Rows of the form of Criteo's files: 40 columns by tabs, no header, empty where missing."""
    random = np.random.default_rng(seed)
    lines = []
    for _ in range(num_rows):
        dense = ["" if x < 0 else str(x) for x in random.integers(-100, 500, 13)]
        ids = ["" if x < 3 else f"{x * 2654435761 % 2**32:08x}" for x in random.integers(0, 60, 26)]
        lines.append("\t".join([str(random.integers(0, 2)), *dense, *ids]))
    Path(path).write_text("\n".join(lines) + "\n")
    return path
