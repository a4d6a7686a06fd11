"""The beginning and the end of a program's process group."""

from __future__ import annotations

import gc
import os
from datetime import timedelta

import torch.distributed as dist

# Their functions have the default group of the time of import as an argument's default, and would
# keep it alive: torch.optim imports them when the first optimizer is made.
import torch.distributed.nn.functional
import torch.distributed.optim.zero_redundancy_optimizer  # noqa: F401


def start_process_group(backend: str, timeout: timedelta | None = None) -> None:
    """`init_process_group(backend)` under torchrun, which also works in ranks that it restarts.

    torchrun keeps one store for all attempts of a job (`--max-restarts`), and ranks that come back
    find in it the addresses of those that died: gloo then ends with "connectFullMesh failed". Here
    each attempt has keys of its own, where all ranks are on one machine. On several, whose counts
    of attempts differ, start torchrun with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, which has the same
    effect.
    """
    env = os.environ
    shared = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if not (shared and env.get("GROUP_WORLD_SIZE") == "1"):
        dist.init_process_group(backend, timeout=timeout)
        return
    rank, size = int(env["RANK"]), int(env["WORLD_SIZE"])
    store = dist.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), size, is_master=False)
    own = dist.PrefixStore(f"attempt-{env['TORCHELASTIC_RESTART_COUNT']}", store)
    dist.init_process_group(backend, store=own, rank=rank, world_size=size, timeout=timeout)


def end_process_group() -> None:
    """Destroys the default group and waits for its threads, so that the interpreter can end.

    A thread of gloo that frees a tensor while the interpreter ends aborts the process ("terminate
    called without an active exception", github.com/pytorch/pytorch/issues/190489).
    `destroy_process_group` joins the threads once nothing else refers to the group: the models and
    pipelines of the caller must be out of scope. To be called where the program is about to end.
    """
    gc.collect()  # sharded modules refer to the group, and to themselves
    dist.destroy_process_group()
