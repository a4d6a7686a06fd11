"""`python -m benchmarks.gpu_parts NAME --json FILE [--quick]`: one part, in this process."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
from pathlib import Path

import torch

from benchmarks.contenders import keep_freed_memory
from benchmarks.gpu_parts.part import Part, machine, versions


def main() -> None:
    """Runs the part; ends without waiting for threads of NCCL and gloo."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(1)
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    part = Part(args.name, device, args.quick or not on_gpu, args.json)
    part.found["device"] = machine(device)
    part.found["versions"] = versions()
    part.save()
    with contextlib.suppress(Exception), part.attempt(args.name):
        importlib.import_module(f"benchmarks.gpu_parts.{args.name}").run(part)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1 if part.found["errors"] else 0)


if __name__ == "__main__":
    main()
