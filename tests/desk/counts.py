"""Kernel launches and waits for the device, counted by what and where (file:line)."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

_HERE = str(Path(__file__).parent)
_OURS, _OTHERS = "/cce_torchrec/", ("/torchrec/", "/fbgemm_gpu/")
_LAUNCHER = "/cce_torchrec/gpu/launch.py"


@dataclass
class Counts:
    """What was noted inside one `counting()`, by (what, file:line)."""

    launches: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Kernels and copies, one an operation: a lower bound, as a sort takes several."""
    waits: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Times the host waits for the device."""

    @property
    def num_launches(self) -> int:
        return self.launches.total()

    @property
    def num_waits(self) -> int:
        return self.waits.total()

    def __str__(self) -> str:
        """The table that a failing budget shows."""
        lines = [f"{self.num_launches} launches, {self.num_waits} waits"]
        for kind, found in (("wait", self.waits), ("launch", self.launches)):
            lines += [f"  {n:5} x {kind} {what} at {at}" for (what, at), n in found.most_common(30)]
        return "\n".join(lines)


_active: list[Counts] = []


@contextmanager
def counting() -> Iterator[Counts]:
    """Counts what happens inside."""
    counts = Counts()
    _active.append(counts)
    try:
        yield counts
    finally:
        _active.remove(counts)


def launched(what: str) -> None:
    """Notes a kernel or an asynchronous copy."""
    for counts in _active:
        counts.launches[what, _place()] += 1


def waited(what: str) -> None:
    """Notes a wait of the host for the device."""
    for counts in _active:
        counts.waits[what, _place()] += 1


def _place() -> str:
    """Innermost line of the package, else of TorchRec or FBGEMM, else of the test."""
    frame, other, test = sys._getframe(2), "", ""
    while frame is not None:
        file = frame.f_code.co_filename
        if _OURS in file and not file.endswith(_LAUNCHER):
            return f"cce_torchrec/{file.rpartition(_OURS)[2]}:{frame.f_lineno}"
        package = next((p for p in _OTHERS if p in file), None)
        if package and not other:
            other = f"{package[1:]}{file.rpartition(package)[2]}:{frame.f_lineno}"
        elif not test and file.startswith(f"{_HERE}/test_"):
            test = f"{Path(file).name}:{frame.f_lineno}"
        frame = frame.f_back
    return other or test or "?"


# Operations without a kernel, beside views.
_FREE = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "detach",
    "alias",
    "lift_fresh",
    "_unsafe_view",
    "_reshape_alias",
    "_local_scalar_dense",
}
# Operations whose result the host has to see before it goes on. (`_assert_async` does not wait.)
_WAITS = {
    "_local_scalar_dense",
    "equal",
    "is_nonzero",
    "nonzero",
    "masked_select",
    "bincount",
    "_unique",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "unique_dim_consecutive",
}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}


def note_operation(func: torch._ops.OpOverload, args: tuple, kwargs: dict) -> None:
    """Notes what an operation on emulated tensors costs a real device."""
    if not _active:
        return
    name = func._schema.name.split("::")[-1]
    if name in _WAITS or (name == "repeat_interleave" and kwargs.get("output_size") is None):
        waited(name)
    elif name == "copy_" and args[0].device != args[1].device and not _asynchronous(*args):
        waited("copy_ between devices")
    elif name in INDEXING:
        indices = [index for index in args[1] if isinstance(index, torch.Tensor)]
        if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
            waited(f"{name} by a mask")
        elif any(index.device.type == "cpu" for index in indices):
            waited(f"{name} by CPU tensors")
    if not func.is_view and name not in _FREE:
        launched(name)


def _asynchronous(to: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> bool:
    return non_blocking and (source.is_pinned() if source.device.type == "cpu" else True)
