"""The networks above the embeddings [B, F, D], as the training program has them."""

from __future__ import annotations

import torch
from torch import nn
from torchrec.models.dlrm import DenseArch, InteractionArch, OverArch


class DLRMNetwork(nn.Module):
    """Logits [B] of TorchRec's DLRM, of the sizes of `cce_torchrec.train`."""

    def __init__(self, dense_features: int, num_features: int, dim: int) -> None:
        super().__init__()
        self.dense_arch = DenseArch(dense_features, [64, dim])
        self.interaction = InteractionArch(num_features)
        pairs = num_features * (num_features + 1) // 2
        self.over_arch = OverArch(dim + pairs, [128, 64, 1])

    def forward(self, dense: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
        """Logits [B]."""
        return self.over_arch(self.interaction(self.dense_arch(dense), embeddings)).squeeze(1)


class GMFNetwork(nn.Module):
    """Logits [B]: the dot product of two embeddings (He et al., WWW 2017)."""

    def forward(self, dense: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
        """Logits [B]; `dense` is not read."""
        return (embeddings[:, 0] * embeddings[:, 1]).sum(1)
