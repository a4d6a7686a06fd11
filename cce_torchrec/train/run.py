"""One run of the program: starts the ranks' process group, trains, and ends it."""

from __future__ import annotations

import argparse
import os
from datetime import timedelta

import torch

from cce_torchrec.distributed.process_group import end_process_group, start_process_group
from cce_torchrec.extras import MissingExtra
from cce_torchrec.train.log import shown
from cce_torchrec.train.trainer import Trainer


def run(args: argparse.Namespace) -> str | None:
    """Trains as `args` say (see options.py); what to tell the user if it could not, or None."""
    device = start_ranks(timedelta(seconds=args.timeout))
    try:
        with shown(args.log_level):
            Trainer(args, device).run()
    except (ValueError, OSError, MissingExtra) as error:
        return str(error)  # alone: the error refers to the model, and so to the group
    finally:
        end_process_group()
    return None


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
