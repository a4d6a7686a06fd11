"""Starts gloo ranks once and runs a list of checks inside them."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PRELOAD = ["torchrec.distributed", "cce_torchrec.clustering", "cce_torchrec.planning"]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _rank(rank: int, world_size: int, port: int, check: Callable, args: tuple, results) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size),
    )  # fmt: skip
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    try:
        results.put((rank, check(rank, world_size, *args), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
    finally:
        dist.destroy_process_group()


def run_ranks(world_size: int, check: Callable, *args) -> list:
    """`check(rank, world_size, *args)` on every rank; its return values, by rank."""
    # Ranks are forked from a server that has imported torch once, and runs no threads.
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    results = context.SimpleQueue()
    port = free_port()
    processes = [
        context.Process(target=_rank, args=(rank, world_size, port, check, args, results))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    got = sorted((results.get() for _ in processes), key=lambda item: item[0])
    for process in processes:
        process.join()
    errors = [f"rank {rank}:\n{error}" for rank, _, error in got if error]
    assert not errors, "\n".join(errors)
    return [value for _, value, _ in got]
