"""Gloo ranks for tests: a file starts them once, and each of its checks is a test of its own."""

from __future__ import annotations

import functools
import inspect
import os
import socket
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PRELOAD = ["torchrec.distributed", "cce_torchrec.planning", "cce_torchrec.train.run"]
LIMIT = 240.0
"""Seconds that a check may take. A collective that waits for a rank raises after 60."""
GRACE = 5.0
"""Seconds that the other ranks have to say how they fared once one has failed."""


class RanksFailed(AssertionError):
    """A check failed on some rank: the traceback of each rank that it failed on."""


def free_port() -> int:
    """A port that nothing listens on at the moment."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def environment_of(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What torchrun sets for a rank."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "MASTER_PORT": port}
    numbers |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), world_size)
    return {"MASTER_ADDR": "127.0.0.1", **{name: str(n) for name, n in numbers.items()}}


def rank_context() -> BaseContext:
    """Of processes that are forked from a server, which has imported torch once.

    It runs no threads.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def _serve(rank: int, world_size: int, port: int, pipe: Connection) -> None:
    """A rank's life: it runs the checks that come through the pipe until that is closed."""
    torch.set_num_threads(1)
    os.environ.update(environment_of(rank, world_size, port))
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    while True:
        try:
            check, args, kwargs = pipe.recv()
        except EOFError:
            break
        # A check that is run alone starts as it does after others.
        torch.manual_seed(0)
        try:
            # `on_ranks` leaves the test under the name of the check, which it wraps.
            value = inspect.unwrap(check)(rank, world_size, *args, **kwargs)
            pipe.send((value, None))
        except BaseException:
            pipe.send((None, traceback.format_exc()))
    dist.destroy_process_group()


class Ranks:
    """Processes with a gloo group among them, which run one check after the other."""

    def __init__(self, world_size: int) -> None:
        context = rank_context()
        self._processes, self._pipes = [], []
        port = free_port()
        for rank in range(world_size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world_size, port, there))
            process.start()
            # Open here too, it would not tell that the rank has died.
            there.close()
            self._processes.append(process)
            self._pipes.append(here)

    def run(self, check: Callable, *args: object, **kwargs: object) -> list:
        """What `check(rank, world_size, *args, **kwargs)` returns on each rank.

        Raises:
            RanksFailed: On some rank it raised, died or did not end. The ranks have to be closed
                then: those that it did not fail on may wait for the one that it failed on.
        """
        for pipe in self._pipes:
            pipe.send((check, args, kwargs))
        values, errors = {}, {}
        waiting = dict(zip(self._pipes, range(len(self._pipes)), strict=True))
        began, until = time.monotonic(), time.monotonic() + LIMIT
        while waiting and (ready := wait(list(waiting), max(0.0, until - time.monotonic()))):
            for pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    values[rank], error = pipe.recv()
                except (EOFError, ConnectionResetError):
                    self._processes[rank].join()
                    error = f"died with exit code {self._processes[rank].exitcode}"
                if error is not None:
                    errors[rank] = error
                    until = min(until, time.monotonic() + GRACE)
        for rank in waiting.values():
            errors[rank] = f"had not ended after {time.monotonic() - began:.0f} s"
        if errors:
            raise RanksFailed("\n".join(f"rank {rank}: {errors[rank]}" for rank in sorted(errors)))
        return [values[rank] for rank in sorted(values)]

    def close(self, wait_seconds: float = 20.0) -> None:
        """Ends the ranks; those that do not end by themselves in this time are killed."""
        for pipe in self._pipes:
            pipe.close()
        until = time.monotonic() + wait_seconds
        for process in self._processes:
            process.join(max(0.0, until - time.monotonic()))
            process.kill()
            process.join()


class RankPool:
    """The ranks of a test file: one group for each number of ranks that its checks ask for."""

    def __init__(self) -> None:
        self._ranks: dict[int, Ranks] = {}

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, *error: object) -> None:
        for ranks in self._ranks.values():
            ranks.close()

    def run(self, world_size: int, check: Callable, *args: object, **kwargs: object) -> list:
        """`Ranks.run` on this many ranks. After a failure the next check starts them afresh."""
        if world_size not in self._ranks:
            self._ranks[world_size] = Ranks(world_size)
        try:
            return self._ranks[world_size].run(check, *args, **kwargs)
        except BaseException:
            self._ranks.pop(world_size).close(wait_seconds=0.0)
            raise


def run_ranks(world_size: int, check: Callable, *args: object) -> list:
    """`check(rank, world_size, *args)` on ranks of its own; its return values, by rank."""
    with RankPool() as pool:
        return pool.run(world_size, check, *args)


def on_ranks(*world_sizes: int) -> Callable[[Callable], Callable]:
    """Makes `check(rank, world_size, ...)` a test on each of these numbers of ranks.

    The checks of a file run in the order of the tests, in the same ranks. What else a check takes
    are parameters and fixtures of pytest, which are pickled for the ranks.
    """

    def as_test(check: Callable) -> Callable:
        @functools.wraps(check)
        def test(rank_pool: RankPool, world_size: int, **fixtures: object) -> None:
            try:
                rank_pool.run(world_size, test, **fixtures)
            except RanksFailed as failed:
                pytest.fail(str(failed), pytrace=False)

        _, *others = inspect.signature(check).parameters.values()
        pool = inspect.Parameter("rank_pool", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        # pytest reads from it which fixtures the test is given: no rank, but the pool.
        test.__signature__ = inspect.Signature([pool, *others])
        return pytest.mark.parametrize("world_size", world_sizes)(test)

    return as_test
