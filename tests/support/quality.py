"""A data set of a few hundred rows, and tables of methods, for tests of benchmarks.quality."""

from dataclasses import replace

import torch

from benchmarks.quality.budgets import Budget
from benchmarks.quality.embedder import Tables
from benchmarks.quality.rows import Training
from cce_torchrec.data import Dataset, Rows

SIZES = {"a": 300, "b": 200}


def tiny_dataset(split):
    """512 rows of two compressed features and a small one, labels by the parity of an id."""
    generator = torch.Generator().manual_seed(split)
    sizes = [*SIZES.values(), 5]
    ids = torch.stack([torch.randint(n, (512,), generator=generator) for n in sizes], dim=1)
    rows = Rows(torch.randn(512, 3, generator=generator), ids, (ids[:, 0] % 2).float())
    train, validation = torch.arange(448), torch.arange(448, 512)
    return Dataset("tiny", {**SIZES, "c": 5}, list(SIZES), rows.take(train), rows.take(validation))


def tables(budget="bytes=12000", form="", optimizer="rowwise_adagrad", rate=0.1, **changes):
    """The two compressed tables, of dimension 16, with what a method is told."""
    sizes = list(SIZES.values())
    made = Tables(
        names=list(SIZES),
        sizes=sizes,
        shares=Budget.parse(budget).shares(sizes, 16),
        bounds=[n**-0.5 for n in sizes],
        dim=16,
        seed=3,
        training=Training(optimizer, rate),
        form=form,
        counts=[torch.arange(n) for n in sizes],
        steps=28,
        passes=2,
        model="dlrm",
        all_rare=True,
    )
    return replace(made, **changes)


def all_ids():
    """Every id of both tables, as lookups take them: [500, 1] would mix tables, so by table."""
    first = torch.stack([torch.arange(200), 300 + torch.arange(200)], dim=1)
    return first
