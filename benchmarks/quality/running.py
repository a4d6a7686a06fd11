"""Computes the missing cells in parallel processes; what is finished is kept."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from threading import Thread

import torch
from tqdm import tqdm

from benchmarks.quality.cells import Group
from benchmarks.quality.grid import missing, unnamed
from benchmarks.quality.problems import PROBLEMS, Problem
from benchmarks.quality.store import Record, Store
from benchmarks.quality.training import record_of


def run(
    store: Store,
    groups: Sequence[Group],
    splits: Sequence[int],
    jobs: int,
    own: Problem | None = None,
) -> None:
    """Computes what `store` lacks of `groups`, `jobs` cells at once, and adds each when it is done.

    A cell that fails stops the run, after those beside it are done; it is named.

    Raises:
        ValueError: a process was ended from outside, as it is where memory is short.

    Args:
        own: a problem that is not of the grid, which the processes of cells are told.
    """
    total = len(remaining(groups, store.records, splits))
    # Not forked: threads of torch and of data readers do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(jobs, context, initializer=_begin, initargs=(own,)) as pool,
        tqdm(total=total, unit="cell", disable=not sys.stderr.isatty()) as bar,
    ):
        running: dict[Future[Record], str] = {}
        try:
            while True:
                _submit(pool, running, store, groups, splits, jobs)
                if not running:
                    return
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    key = running.pop(future)
                    if isinstance(future.exception(), BrokenProcessPool):
                        raise ValueError(
                            f"the process of a cell was ended from outside ({key}, or one beside "
                            "it), as happens where memory is short; finished cells are kept: run "
                            "again with fewer --jobs"
                        )
                    if future.exception() is not None:
                        print(f"failed: {key}", file=sys.stderr)
                    store.add(future.result())
                    bar.update()
        finally:
            pool.shutdown(cancel_futures=True)
            for future in running:  # none, unless a cell has failed
                if future.done() and not future.cancelled() and future.exception() is None:
                    store.add(future.result())


def _submit(
    pool: ProcessPoolExecutor,
    running: dict[Future[Record], str],
    store: Store,
    groups: Sequence[Group],
    splits: Sequence[int],
    jobs: int,
) -> None:
    """Keeps as many cells under way as there are processes."""
    under_way = set(running.values())
    for group in groups:
        for cell in missing(group, store.records, splits):
            if len(running) >= jobs:
                return
            if cell.key not in under_way:
                running[pool.submit(record_of, cell)] = cell.key
                under_way.add(cell.key)  # budgets that share the cells of tuning


def _begin(own: Problem | None) -> None:
    if own is not None:
        PROBLEMS[own.name] = own
    one_thread()


def one_thread() -> None:
    """One core a cell, and no cell without the run that waits for it, however that ends."""
    torch.set_num_threads(1)
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def remaining(
    groups: Sequence[Group], records: Mapping[str, Record], splits: Sequence[int]
) -> dict[str, Group]:
    """Cells of `groups` that are still to be computed, each once, without rates beyond edges.

    By keys; those that depend on a choice that is still open have keys of their own.
    """
    found: dict[str, Group] = {}
    for group in groups:
        named = [cell.key for cell in missing(group, records, splits)]
        for key in (*named, *unnamed(group, records, splits)):
            found.setdefault(key, group)
    return found
