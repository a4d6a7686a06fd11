"""MovieLens-1M, from the files of GroupLens or from parquet."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from cce_torchrec.data.dataset import Dataset, Rows, distinct_ids, require_columns

if TYPE_CHECKING:
    import pandas as pd


def _ml_1m_frames(path: str | None) -> tuple[pd.DataFrame, pd.DataFrame]:
    import pandas as pd

    if path is None:
        raise ValueError("ml-1m cannot be shipped; give --data the folder of MovieLens-1M")
    folder = Path(path)
    parquet, official = folder / "ratings.parquet", folder / "ratings.dat"
    if parquet.exists():
        source, ratings = parquet, pd.read_parquet(parquet)
    elif official.exists():
        source = official
        # pandas' faster engine takes separators of one character only.
        ratings = pd.read_csv(official, sep="::", engine="python", header=None, encoding="latin-1")
        names = ["user", "item", "rating", "timestamp"]
        ratings.columns = names[: ratings.shape[1]]
    else:
        raise ValueError(f"{folder} holds neither ratings.parquet nor ratings.dat")
    require_columns(ratings, ["user", "item", "rating"], source)
    users_file = folder / "users.dat"
    users = pd.DataFrame()
    if users_file.exists():
        # As text: a zip code may begin with 0 or have a dash.
        users = pd.read_csv(
            users_file, sep="::", engine="python", header=None, encoding="latin-1", dtype=str
        )
        names = ["user", "gender", "age", "occupation", "zip_code"]
        users.columns = names[: users.shape[1]]
        require_columns(users, names, users_file)
        users["user"] = users["user"].astype("int64")
    return ratings, users


def ml_1m(path: str | None, model: str, split_seed: int) -> Dataset:
    """MovieLens-1M: rating 3 dropped, label rating >= 4, 2 ratings per user held out."""
    ratings, users = _ml_1m_frames(path)
    ratings = ratings[ratings["rating"] != 3].reset_index(drop=True)
    names = ["user", "item"]
    if model == "dlrm":
        if users.empty:
            raise ValueError(f"{path} has no users.dat, which --model dlrm reads")
        ratings = ratings.merge(users, on="user", how="left")
        names += ["gender", "age", "occupation", "zip_code"]
    columns, sizes = zip(*(distinct_ids(ratings, [n]) for n in names), strict=True)
    rng = np.random.default_rng(split_seed)
    shuffled = rng.permutation(len(ratings))
    # Stable: a user's ratings stay in the order of the permutation, and so in that of the seed.
    by_user = shuffled[np.argsort(columns[0][shuffled], kind="stable")]
    ordered = columns[0][by_user]
    first = np.searchsorted(ordered, ordered)  # where each row's user starts
    validates = np.arange(len(ordered)) - first < 2
    rows = Rows(
        torch.ones(len(ratings), 1),  # there are no dense features, and DLRM has a part for them
        torch.from_numpy(np.stack(columns, axis=1)),
        torch.from_numpy((ratings["rating"].to_numpy() >= 4).astype(np.float32)),
    )
    return Dataset(
        "ml-1m",
        dict(zip(names, sizes, strict=True)),
        ["user", "item"] + (["zip_code"] if model == "dlrm" else []),
        rows.take(torch.from_numpy(np.sort(by_user[~validates]))),
        rows.take(torch.from_numpy(np.sort(by_user[validates]))),
    )
