"""The end of a program's process group."""

from __future__ import annotations

import gc

import torch.distributed as dist

# Their functions have the default group of the time of import as an argument's default, and would
# keep it alive: torch.optim imports them when the first optimizer is made.
import torch.distributed.nn.functional
import torch.distributed.optim.zero_redundancy_optimizer  # noqa: F401


def end_process_group() -> None:
    """Destroys the default group and waits for its threads, so that the interpreter can end.

    A thread of gloo that frees a tensor while the interpreter ends aborts the process ("terminate
    called without an active exception", github.com/pytorch/pytorch/issues/190489).
    `destroy_process_group` joins the threads once nothing else refers to the group: the models and
    pipelines of the caller must be out of scope. To be called where the program is about to end.
    """
    gc.collect()  # sharded modules refer to the group, and to themselves
    dist.destroy_process_group()
