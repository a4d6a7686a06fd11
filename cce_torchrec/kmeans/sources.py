"""What kernels get of points, and the sums that they add to."""

from __future__ import annotations

from dataclasses import dataclass

import torch

Sums = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Per cluster, int64: summed coordinates [k, s], sizes [k], errors [k]."""


@dataclass(frozen=True)
class Sources:
    """Where a kernel finds the fixed-point coordinates of points: main[a] + helper[b], or main."""

    main: torch.Tensor
    """int32 [rows, dim], contiguous."""
    helper: torch.Tensor | None = None
    """int32 [rows, dim], contiguous, where points are pairs."""
    a: torch.Tensor | None = None
    """int32 [num_points]."""
    b: torch.Tensor | None = None
    """int32 [num_points]."""

    @property
    def dim(self) -> int:
        """Coordinates of a point."""
        return self.main.shape[1]

    @property
    def pairs(self) -> bool:
        """Whether points are pairs of rows."""
        return self.helper is not None

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """main, helper, a and b; main stands for those that are not there."""
        # Triton's kernels have a pointer for each, and do not read it where points are no pairs.
        return tuple(
            self.main if t is None else t for t in (self.main, self.helper, self.a, self.b)
        )
