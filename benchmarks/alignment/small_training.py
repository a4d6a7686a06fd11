"""Many small ReLU networks of one hidden layer, trained side by side on examples of their own."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn import functional

RATE = 0.03
_START = 0.1
"""First weights, by those that keep variances: less leaves more of the hidden layer to training."""


@dataclass(frozen=True)
class Networks:
    """Weights of B networks."""

    first: torch.Tensor
    """[B, d, h]."""
    shift: torch.Tensor
    """[B, 1, h]."""
    second: torch.Tensor
    """[B, h, k]."""
    offset: torch.Tensor
    """[B, 1, k]."""

    def hidden(self, inputs: torch.Tensor) -> torch.Tensor:
        """Hidden activations, [B, n, h], of inputs [B or 1, n, d]."""
        each = inputs.expand(len(self.first), -1, -1)
        return torch.baddbmm(self.shift, each, self.first).relu()

    def outputs(self, inputs: torch.Tensor) -> torch.Tensor:
        """[B, n, k], of inputs [B or 1, n, d]."""
        return torch.baddbmm(self.offset, self.hidden(inputs), self.second)


def train_all(
    inputs: torch.Tensor, labels: torch.Tensor, *, hidden: int, classes: int, steps: int, seed: int
) -> Networks:
    """Networks trained by Adam on all of their examples at once, its rate going to 0 as a cosine.

    Args:
        inputs: [B, n, d].
        labels: [B, n], numbers, or classes as int64.
        hidden: units of the hidden layer.
        classes: 0: regression by squares; else cross entropy of so many.
        steps: of Adam.
        seed: of the first weights, which differ between all networks.
    """
    count, _, d = inputs.shape
    k = max(classes, 1)
    generator = torch.Generator().manual_seed(seed)
    first = _START * (2 / d) ** 0.5 * torch.randn(count, d, hidden, generator=generator)
    second = _START * hidden**-0.5 * torch.randn(count, hidden, k, generator=generator)
    weights = [first, torch.zeros(count, 1, hidden), second, torch.zeros(count, 1, k)]
    nets = Networks(*(w.requires_grad_() for w in weights))
    optimizer = torch.optim.Adam(weights, RATE, fused=True)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = RATE * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        optimizer.zero_grad()
        loss_sum(nets.outputs(inputs), labels, classes).backward()
        optimizer.step()
    return Networks(*(w.detach() for w in weights))


def loss_sum(outputs: torch.Tensor, labels: torch.Tensor, classes: int) -> torch.Tensor:
    """Sum over networks of their mean losses.

    Args:
        outputs: [B, n, k].
        labels: [B, n].
        classes: see `train_all`.
    """
    n = labels.shape[1]
    if classes:
        losses = functional.cross_entropy(outputs.flatten(0, 1), labels.flatten(), reduction="sum")
        return losses / n
    return (outputs[..., 0] - labels).square().sum() / n


def wrong(outputs: torch.Tensor, labels: torch.Tensor, classes: int) -> torch.Tensor:
    """Of each network, [B]: the share of wrong classes, or the mean square of what is missed.

    Args:
        outputs: [B, n, k].
        labels: [B or 1, n].
        classes: see `train_all`.
    """
    if classes:
        return (outputs.argmax(-1) != labels).float().mean(1)
    return (outputs[..., 0] - labels).square().mean(1)
