"""Whether buffers are still those, and as written, that something was computed from.

Codes and the number of clusterings are written by clustering steps and loads, and by whoever else
copies into a model's buffers or puts others in their place. What is computed from them is compared
with the buffers themselves, so that nobody has to be told of a write.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cce_torchrec.torchrec_internals import version_of


class Written:
    """Buffers as they were written by the time that this was made.

    By torch's count of writes, which costs no wait for a device. It misses writes through
    `tensor.data` and by other libraries that have the address.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        # Kept alive, so that no tensor that comes later can be taken for one of them.
        self._tensors = list(tensors)
        self._versions = [version_of(tensor) for tensor in tensors]

    def is_unchanged(self) -> bool:
        """Whether none of them was written since."""
        # A loop, as every batch asks for each table, and comprehensions take twice as long.
        for tensor, version in zip(self._tensors, self._versions, strict=True):
            if version is None or version_of(tensor) != version:
                return False
        return True

    def is_current(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether `tensors` are the same ones, and none was written since."""
        if len(tensors) != len(self._tensors):
            return False
        for given, own in zip(tensors, self._tensors, strict=True):
            if given is not own:
                return False
        return self.is_unchanged()
