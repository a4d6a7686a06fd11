"""Initial values of codebooks."""

from __future__ import annotations

import math

import torch

from cce_torchrec.config import CCEEmbeddingBagConfig


class CodebookInit:
    """Fills one physical table so that main + helper is distributed as a plain table's rows.

    With bounds [lo, hi], both parts are uniform with half of the variance each and main carries
    the mean; a custom `init_fn` fills main and leaves the helper at zero, so that the embeddings
    are exactly what it drew.
    """

    def __init__(self, config: CCEEmbeddingBagConfig) -> None:
        self._num_rows = config.num_rows
        self._has_helper = config.helper_rows > 0
        self._trains_main = config.trains_main
        self._init_fn = config.init_fn if config.has_custom_init else None
        low, high = config.get_weight_init_min(), config.get_weight_init_max()
        self._middle = (low + high) / 2
        both = self._has_helper and self._trains_main
        self._half = (high - low) / 2 / (math.sqrt(2) if both else 1)

    def _uniform(self, rows: torch.Tensor) -> None:
        rows.uniform_(self._middle - self._half, self._middle + self._half)

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        """Fills `weight` [k + k', s] in place and returns it."""
        with torch.no_grad():
            main, helper = weight[: self._num_rows], weight[self._num_rows :]
            # An id reads its helper row alone until main is set by a clustering.
            if not self._trains_main:
                fill = self._init_fn or self._uniform
                fill(helper)
                main.zero_()
            elif self._init_fn is not None:
                self._init_fn(main)
                helper.zero_()
            else:
                self._uniform(main)
                helper.uniform_(-self._half, self._half)
        return weight
