"""`torchrun ... -m cce_torchrec.train`: train DLRM or GMF with full or compressed tables."""

from __future__ import annotations

import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

from cce_torchrec.distributed.process_group import end_process_group
from cce_torchrec.train import options
from cce_torchrec.train.trainer import Trainer


def main(argv: list[str] | None = None) -> None:
    """Runs the program; under torchrun with its ranks, otherwise as one."""
    args = options.parse(argv)
    device = _start_ranks(timedelta(seconds=args.timeout))
    failure: str | None = None
    try:
        Trainer(args, device).run()
    except ValueError as error:  # not kept: it refers to the model, and so to the group
        failure = f"error: {error}"
    finally:
        end_process_group()
    if failure is not None:
        sys.exit(failure)


def _start_ranks(timeout: timedelta) -> torch.device:
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "0")  # any that is free: another run may be on
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", timeout=timeout)
        return device
    dist.init_process_group("gloo", timeout=timeout)
    return torch.device("cpu")


if __name__ == "__main__":
    main()
