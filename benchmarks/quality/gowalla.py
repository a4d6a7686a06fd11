"""Gowalla's check-ins with sampled negatives, for a dot product of user and item."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from cce_torchrec.data.dataset import Dataset, Rows, distinct_ids, random_split, require_columns

NEGATIVES = 4
"""For each check-in, drawn uniformly from the items that its user has not visited."""
_HELD_OUT = 0.1


def gowalla(file: Path, split: int) -> Dataset:
    """The check-ins of `file` and their negatives, a random tenth held out with its negatives.

    Raises:
        ValueError: the file is not there, or lacks a column.
    """
    if not file.exists():
        raise ValueError(
            f"no file {file}; give --data (or CCE_DATA_DIR) the folder that has gowalla.parquet: "
            "columns user and item, the 10-core set of check-ins that LightGCN's authors publish"
        )
    import pandas as pd

    frame = pd.read_parquet(file)
    require_columns(frame, ["user", "item"], file)
    (users, num_users), (items, num_items) = (distinct_ids(frame, [n]) for n in ("user", "item"))
    negatives = unvisited(users, items, num_items, NEGATIVES, split)
    train, validation = random_split(len(users), _HELD_OUT, split)
    return Dataset(
        "gowalla",
        {"user": num_users, "item": num_items},
        ["user", "item"],
        *(_rows(users, items, negatives, part.numpy()) for part in (train, validation)),
    )


def unvisited(
    users: np.ndarray, items: np.ndarray, num_items: int, each: int, seed: int
) -> np.ndarray:
    """Items [n, each], uniform among those that the user of each of the n visits never visited."""
    rng = np.random.default_rng(seed)
    visited = np.unique(users * num_items + items)
    drawn = rng.integers(num_items, size=(len(users), each))
    again = np.ones(drawn.shape, dtype=bool)
    while again.any():
        rows, columns = np.nonzero(again)
        pairs = users[rows] * num_items + drawn[rows, columns]
        at = np.searchsorted(visited, pairs).clip(max=len(visited) - 1)
        was_there = visited[at] == pairs
        again[rows, columns] = was_there
        drawn[again] = rng.integers(num_items, size=int(was_there.sum()))
    return drawn


def _rows(users: np.ndarray, items: np.ndarray, negatives: np.ndarray, part: np.ndarray) -> Rows:
    """The visits `part`, each followed by its negatives."""
    choices = np.concatenate([items[part, None], negatives[part]], axis=1)
    ids = np.stack([np.repeat(users[part], choices.shape[1]), choices.reshape(-1)], axis=1)
    labels = np.zeros(choices.shape, dtype=np.float32)
    labels[:, 0] = 1.0
    return Rows(
        torch.ones(len(ids), 1), torch.from_numpy(ids), torch.from_numpy(labels.reshape(-1))
    )
