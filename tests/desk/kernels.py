"""Launches of Triton kernels, interpreted on the memory of emulated tensors between guards."""

from __future__ import annotations

from typing import Any

import torch
from triton.runtime.interpreter import InterpretedFunction

from tests.desk import counts
from tests.desk.arguments import mapped, tensors_in
from tests.desk.emulated import Emulated

GUARD = 4096
"""Elements on either side of an argument that a kernel has to leave alone."""
_UNTOUCHED = 0xA5
_interpret = InterpretedFunction.run


def run_interpreted(self: Any, *args: Any, **kwargs: Any) -> None:
    """In place of `InterpretedFunction.run`: one launch, whoever makes it.

    Raises:
        ValueError: CPU tensors among the arguments.
        AssertionError: the kernel wrote outside of its arguments (those it was given as tensors;
            what it reaches by an address in a descriptor is not watched).
    """
    counts.launched(f"Triton's {self.__name__}")
    tensors = tensors_in((args, kwargs))
    own = [t for t in tensors if isinstance(t, Emulated)]
    if own and len(own) < len(tensors):
        raise ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)")
    guarded: dict[tuple[int, torch.dtype], _Guarded] = {}

    def in_guards(tensor: torch.Tensor) -> torch.Tensor:
        memory = tensor.on_cpu if isinstance(tensor, Emulated) else tensor
        if not memory.is_contiguous():
            return memory
        key = (memory.data_ptr(), memory.dtype)
        if key not in guarded or guarded[key].of.numel() < memory.numel():
            guarded[key] = _Guarded(memory)
        return guarded[key].inside

    # Twice, as the first pass finds the largest of several tensors at one address.
    mapped(torch.Tensor, in_guards, (args, kwargs))
    args, kwargs = mapped(torch.Tensor, in_guards, (args, kwargs))
    _interpret(self, *args, **kwargs)
    for one in guarded.values():
        one.check(self.__name__)


class _Guarded:
    """A copy of a tensor's memory between guards, written back after the launch."""

    def __init__(self, of: torch.Tensor) -> None:
        self.of, self._margin = of, GUARD * of.element_size()
        size = 2 * self._margin + of.numel() * of.element_size()
        self._bytes = torch.full((size,), _UNTOUCHED, dtype=torch.uint8)
        middle = self._bytes[self._margin : size - self._margin]
        self.inside = middle.view(of.dtype).view(of.shape)
        self.inside.copy_(of)

    def check(self, kernel: str) -> None:
        ends = self._bytes[: self._margin], self._bytes[len(self._bytes) - self._margin :]
        touched = sum(int((end != _UNTOUCHED).sum()) for end in ends)
        assert not touched, (
            f"kernel {kernel} wrote {touched} bytes outside of an argument {self.of.dtype} "
            f"{tuple(self.of.shape)}"
        )
        if not torch.equal(self.inside, self.of):
            self.of.copy_(self.inside)
