"""Ids out of bounds: found before expansion, treated as FBGEMM's bounds_check_mode says."""

from __future__ import annotations

import logging

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode

logger = logging.getLogger(__name__)


class BoundsCheck:
    """Finds ids outside [0, num_embeddings) before they are expanded, in a copy of the ids."""

    def __init__(self, mode: BoundsCheckMode) -> None:
        self.mode = mode
        self._found = 0
        self._on_device: dict[str, torch.Tensor] = {}
        self._warned: set[str] = set()

    @property
    def tells(self) -> bool:
        """Whether ids out of bounds are counted or raised, and not only read as 0."""
        return self.mode in (BoundsCheckMode.FATAL, BoundsCheckMode.WARNING)

    @property
    def num_invalid(self) -> int:
        """Ids out of bounds seen so far in WARNING mode.

        On CUDA they are counted there; asking waits for the device and logs the warnings.
        """
        counts = {name: int(count) for name, count in self._on_device.items()}
        for name, count in counts.items():
            if count:
                self._warn(name, f"{name}: {count} ids were out of bounds")
        return self._found + sum(counts.values())

    def __call__(self, name: str, ids: torch.Tensor, num_embeddings: int) -> torch.Tensor:
        """`ids` with those out of bounds read as 0.

        In WARNING mode on CUDA they are counted on the device, which is not waited for.

        Raises:
            ValueError: in FATAL mode, naming table, feature and the first bad value.
        """
        if self.mode == BoundsCheckMode.NONE or ids.numel() == 0 or ids.is_meta:
            return ids
        invalid = (ids < 0) | (ids >= num_embeddings)
        if self.tells and not self.counted_on_device(name, invalid):
            count = int(invalid.sum())
            if count == 0:
                return ids
            self.found(name, count, int(ids[invalid][0]), num_embeddings)
        return ids.masked_fill(invalid, 0)  # a copy, as the batch is the caller's

    def counted_on_device(self, name: str, invalid: torch.Tensor) -> bool:
        """Whether `invalid` ids were counted where they are: in WARNING mode, on CUDA.

        To read the number would wait for the device in every batch.
        """
        if not invalid.is_cuda:
            return False
        if self.mode != BoundsCheckMode.WARNING:
            self.refuse_capture()
            return False
        if name not in self._on_device:
            self._on_device[name] = torch.zeros((), dtype=torch.int64, device=invalid.device)
        self._on_device[name].add_(invalid.sum())
        return True

    def without_counting(self) -> BoundsCheck:
        """For ids that were checked before, and shall not be counted again."""
        unchecked = self.mode == BoundsCheckMode.NONE
        return BoundsCheck(BoundsCheckMode.NONE if unchecked else BoundsCheckMode.IGNORE)

    def watch(self, name: str, count: torch.Tensor) -> None:
        """Takes `count`, int64 [], for where a kernel counts the bad ids of `name`."""
        if self.mode == BoundsCheckMode.WARNING:
            if name in self._on_device:
                # What was counted before goes on in the new place: nothing is told twice or lost.
                count += self._on_device[name].to(count.device)
            self._on_device[name] = count

    def found(
        self,
        name: str,
        count: int | None,
        first: int,
        num_embeddings: int,
        end: str = "raise num_embeddings",
    ) -> None:
        """Treats `count` bad ids (None: not counted), the first of which is `first`.

        A message says that `end` would give them a place.

        Raises:
            ValueError: in FATAL mode.
        """
        if not self.tells:
            return
        message = f"{name}: id {first} is outside [0, {num_embeddings})"
        if count is not None:
            message += f" ({count} such ids in this batch)"
        if self.mode == BoundsCheckMode.FATAL:
            raise ValueError(f"{message}; {end} or map the ids into range")
        self._found += count or 0
        self._warn(name, message)

    def refuse_capture(self) -> None:
        """Refuses FATAL mode while a CUDA graph is captured, which cannot ask for the first bad id.

        Raises:
            ValueError: naming the remedy.
        """
        capturing = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
        if self.mode == BoundsCheckMode.FATAL and capturing:
            raise ValueError(
                "bounds_check_mode FATAL reads ids out of bounds back from the GPU, which a CUDA "
                "graph that is being captured cannot do; build the collection with WARNING and "
                "look at num_invalid_ids"
            )

    def _warn(self, name: str, message: str) -> None:
        if name not in self._warned:
            self._warned.add(name)
            logger.warning("%s; reading id 0 instead, further ones are only counted", message)
