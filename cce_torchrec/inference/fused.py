"""The lookup of packed tables as one compiled operator, which reads each id once."""

# No annotations as strings: TorchScript reads those of classes, as types.

import torch

from cce_torchrec.inference.lookup import PackedLookup, check_weights, numbers_of, refuse_cuda
from cce_torchrec.inference.packed_tables import PackedTables


class FusedLookup(PackedLookup):
    """See `PackedLookup`; a process that loads it needs the library of native.py."""

    numbers: torch.Tensor
    """int64 [features, ...]: what the operator is told of them."""

    def __init__(self, packed: PackedTables, ignores: bool = False) -> None:
        super().__init__(packed, ignores)
        self.register_buffer("numbers", torch.tensor(numbers_of(packed)))

    def forward(
        self, values: torch.Tensor, lengths: torch.Tensor, weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See the class."""
        refuse_cuda(values, self.rows)
        check_weights(self.is_weighted, weights)
        return torch.ops.cce_inference.lookup(
            values, lengths, weights, self.codes, self.rows, self.numbers, self.hashes,
            self.num_inputs, self.total_dim, self.ignores, self.names,
        )  # fmt: skip
