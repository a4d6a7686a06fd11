"""Computes the cells of a part that are missing, and keeps each when it is done."""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.alignment.parts import Cell, Part, Record
from benchmarks.machine import device_name
from benchmarks.quality.running import one_thread
from benchmarks.quality.store import Store


def records_of(part: Part, folder: Path, quick: bool, jobs: int, compute: bool) -> list[Record]:
    """The records of the cells of `part`; what is not there is computed, if `compute`."""
    store = Store(
        folder, lambda record: "" if {"key", "dataset"} <= set(record) else "without a key"
    )
    cells = part.cells(quick)
    absent = [cell for cell in cells if cell.key not in store.records] if compute else []
    if absent:
        _compute(part.name, absent, store, jobs)
    return [store.records[cell.key] for cell in cells if cell.key in store.records]


def _compute(part: str, cells: Sequence[Cell], store: Store, jobs: int) -> None:
    """Adds each cell when it is done; one that fails is named, and ends the run."""
    progress = partial(tqdm, total=len(cells), unit="cell", disable=not sys.stderr.isatty())
    if jobs == 1:
        for cell in progress(cells):
            with _named(cell):
                store.add(measured(part, cell))
        return
    # Not forked: threads of torch do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=one_thread) as pool:
        running = {pool.submit(measured, part, cell): cell for cell in cells}
        try:
            for future in progress(as_completed(running)):
                with _named(running[future]):
                    store.add(future.result())
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def _named(cell: Cell) -> Iterator[None]:
    try:
        yield
    except BaseException:
        print(f"failed: {cell.key}", file=sys.stderr)
        raise


def measured(part: str, cell: Cell) -> Record:
    """The record of a cell: what it measured, and where."""
    begin = time.process_time()
    found = cell.measure()
    return {
        "key": cell.key,
        "dataset": part,  # by which `Store` names the file
        **found,
        "device": device_name(torch.device("cpu")),
        "versions": {"torch": torch.__version__.split("+")[0]},
        "cpu_seconds": round(time.process_time() - begin, 2),
    }
