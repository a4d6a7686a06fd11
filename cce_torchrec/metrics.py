"""Log loss and AUC of binary predictions, exact over rows."""

from __future__ import annotations

import torch


def log_loss(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Mean over rows of the binary cross entropy, in float64."""
    return float(
        torch.nn.functional.binary_cross_entropy_with_logits(logits.double(), labels.double())
    )


def auc(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Area under the ROC curve; ties count half. NaN if only one class occurs."""
    _, inverse, counts = torch.unique(logits, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    ranks = (last - (counts.double() - 1) / 2)[inverse]
    positive = labels > 0.5
    num_positive, num_negative = int(positive.sum()), int((~positive).sum())
    if num_positive == 0 or num_negative == 0:
        return float("nan")
    wins = float(ranks[positive].sum()) - num_positive * (num_positive + 1) / 2
    return wins / (num_positive * num_negative)
