"""What it takes a GPU to read a word an id at random places: no expansion can take less."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from benchmarks.contenders import Setting
from benchmarks.gpu_parts.timing import device_ms

VALUES, WARPS = 512, 8
"""On an H100 128 to 1,024 ids a program, and 4 to 8 warps, take as long."""


@triton.jit
def read(ids_ptr, words_ptr, out_ptr, count, VALUES: tl.constexpr):  # type: ignore[no-untyped-def]
    """out[i] = words[ids[i]], and nothing else."""
    at = tl.program_id(0) * VALUES + tl.arange(0, VALUES)
    ids = tl.load(ids_ptr + at, mask=at < count, other=0)
    tl.store(out_ptr + at, tl.load(words_ptr + ids, mask=at < count), mask=at < count)


def milliseconds(setting: Setting, device: torch.device, calls: int) -> float:
    """Of one read of 8 bytes an id, of as many ids and tables as `setting` has, one table after
    the other: codes without hashes, rows, bags and checks."""
    words = torch.zeros(setting.tables * setting.num_ids, dtype=torch.int64, device=device)
    each = setting.batch * setting.bag
    tables = torch.arange(setting.tables, device=device)[:, None] * setting.num_ids
    launches = []
    for _ in range(calls):
        ids = torch.randint(setting.num_ids, (setting.tables, each), device=device) + tables
        out = torch.empty(ids.numel(), dtype=torch.int64, device=device)
        grid = (-(-ids.numel() // VALUES),)
        arguments = (ids.view(-1), words, out, ids.numel())
        kernel = functools.partial(read[grid], VALUES=VALUES, num_warps=WARPS)
        launches.append(functools.partial(kernel, *arguments))
    return device_ms(launches, device)
