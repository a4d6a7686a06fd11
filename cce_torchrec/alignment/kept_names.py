"""What the ids of a run's tables are called, where the run has numbered them itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cce_torchrec.checkpoint.manifest import TableRecord
from cce_torchrec.data.kept_scan import FILE
from cce_torchrec.extras import load_extra


def kept_names(checkpoint: Path, record: TableRecord) -> np.ndarray | None:
    """Keys [N] of the ids of a table, by the vocabulary that the training program keeps.

    None where the run has none, as that of another program, or one that does not have this table's
    column and all its ids.

    Args:
        checkpoint: folder of a checkpoint in a folder of a run.
        record: of the table.
    """
    file = checkpoint.parent.parent / FILE
    features = [] if record.reading is None else record.reading.features
    if len(features) != 1 or not file.exists():
        return None
    parquet = load_extra("pyarrow.parquet", "data", "the vocabulary of a run")
    rows = parquet.read_table(file, filters=[("column", "=", features[0])])
    keys, ids = (rows.column(name).to_numpy() for name in ("key", "id"))
    if len(ids) != record.num_embeddings or not np.array_equal(np.sort(ids), np.arange(len(ids))):
        return None
    names = np.empty(len(ids), dtype=keys.dtype)
    names[ids] = keys
    return names
