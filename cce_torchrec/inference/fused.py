"""The lookup of packed tables as one compiled operator, which reads each id once."""

from __future__ import annotations

from typing import Optional

import torch

from cce_torchrec.inference.lookup import PackedLookup


class FusedLookup(PackedLookup):
    """See `PackedLookup`; a process that loads it needs the library with the operator."""

    def forward(
        self,
        values: torch.Tensor,
        lengths: torch.Tensor,
        weights: Optional[torch.Tensor] = None,  # noqa: UP045  # TorchScript reads no other form
    ) -> torch.Tensor:
        """See `PortableLookup.forward`."""
        return torch.ops.cce_inference.lookup(
            values, lengths, weights, self.codes, self.rows, self.numbers, self.hashes,
            self.num_inputs, self.total_dim, self.ignores, self.names,
        )  # fmt: skip
