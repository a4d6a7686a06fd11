"""One run of the program: starts the ranks' process group, trains, and ends it."""

from __future__ import annotations

import argparse
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType

import torch
import torch.distributed as dist

from cce_torchrec.distributed.process_group import end_process_group, start_process_group
from cce_torchrec.extras import MissingExtra
from cce_torchrec.reasons import first_line
from cce_torchrec.train.log import shown
from cce_torchrec.train.trainer import Trainer


def run(args: argparse.Namespace) -> str | None:
    """Trains as `args` say (see options.py); what to tell the user if it could not, or None."""
    try:
        device = start_ranks(timedelta(seconds=args.timeout))
    except (dist.DistError, ValueError) as error:
        return _not_started(error)
    try:
        with shown(args.log_level), _ending_by_exception():
            Trainer(args, device).run()
    except (ValueError, OSError, MissingExtra) as error:
        return str(error)  # alone: the error refers to the model, and so to the group
    finally:
        end_process_group()
    return None


def _not_started(error: Exception) -> str:
    """What to do where the ranks do not find each other."""
    host, port = (os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
    if "EADDRINUSE" in str(error):
        return (
            f"port {port} of {host} is in use by another program: give another one "
            "(MASTER_PORT, torchrun --master-port), or let torchrun --standalone find one"
        )
    return f"the ranks of this job did not find each other at {host}:{port} ({first_line(error)})"


@contextmanager
def _ending_by_exception() -> Iterator[None]:
    """Inside, the first rank ends by an exception where it is asked to end, and so says that.

    As torchrun asks it where another rank has failed, and clusters that want a machine back.
    """
    is_ours = dist.get_rank() == 0 and threading.current_thread() is threading.main_thread()
    if not is_ours or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def end(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)  # as a shell says of a process that the signal has ended

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def start_ranks(timeout: timedelta) -> torch.device:
    """Starts the process group of all ranks, or of one by itself; the device of this rank."""
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "0")  # any that is free: another run may be on
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        start_process_group("nccl", timeout)
        return device
    start_process_group("gloo", timeout)
    return torch.device("cpu")
