"""Log loss and AUC of binary predictions: exact over rows, or from a histogram of logits."""

from __future__ import annotations

import torch

BINS = 1 << 13
"""Of a histogram of logits: 1/256 wide each."""
_LIMIT = 16.0
"""Logits beyond +-16 (chances of 1e-7) are in the last bins."""


def log_loss(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Mean over rows of the binary cross entropy, in float64."""
    # In float64, whose sums do not depend on how rows were cut into batches.
    return float(
        torch.nn.functional.binary_cross_entropy_with_logits(logits.double(), labels.double())
    )


def auc(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Area under the ROC curve; ties count half. NaN if only one class occurs."""
    # Mann and Whitney's form: the share of pairs in which the positive one has the higher rank.
    _, inverse, counts = torch.unique(logits, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    ranks = (last - (counts.double() - 1) / 2)[inverse]
    positive = labels > 0.5
    num_positive, num_negative = int(positive.sum()), int((~positive).sum())
    if num_positive == 0 or num_negative == 0:
        return float("nan")
    wins = float(ranks[positive].sum()) - num_positive * (num_positive + 1) / 2
    return wins / (num_positive * num_negative)


def add_logits(histogram: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> None:
    """Counts predictions in `histogram`, of which nothing waits for a device.

    torchmetrics' binned AUROC compares every prediction with every threshold, which takes as long
    as a training step; a bin of equal width is found by one multiplication.

    Args:
        histogram: int64 or float64 [2 * BINS], of examples with label 0, then with label 1.
        logits: [n]; NaN counts as the lowest.
        labels: [n] of 0 and 1.
    """
    places = (logits.float() + _LIMIT).mul_(BINS / (2 * _LIMIT)).nan_to_num_(0.0)
    places = places.clamp_(0, BINS - 1).long() + (labels > 0.5) * BINS
    histogram.index_add_(0, places, histogram.new_ones(()).expand(len(places)))


def histogram_auc(histogram: torch.Tensor) -> tuple[float, float]:
    """The AUC of a histogram of logits, and the most by which it differs from the exact one.

    Examples of one bin count as ties, which count half. So it differs by half of the share of pairs
    (one example of each label) that fall into one bin, at most. NaN if only one class occurs.
    """
    # On the CPU, as the sums are few and their results are read at once.
    negative, positive = histogram.cpu().double().view(2, BINS)
    pairs = float(negative.sum() * positive.sum())
    if pairs == 0:
        return float("nan"), float("nan")
    below = negative.cumsum(0) - negative
    ties = float((positive * negative).sum()) / 2
    return (float((positive * below).sum()) + ties) / pairs, ties / pairs
