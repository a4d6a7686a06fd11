"""How many ids have another cluster than before, whatever the clusters are called."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from cce_torchrec.clustering.moves import matched_ids

_DENSE = 1 << 22
"""Most pairs of codes that are counted in a table of all; of more, those that there are."""


class Contingency:
    """How many ids have each pair of codes, of one chunk before and after.

    Args:
        before: codes that there are.
        after: the same on the other side.
    """

    def __init__(self, before: int, after: int) -> None:
        self._before, self._after = before, after
        self._dense = np.zeros(before * after, np.int64) if before * after <= _DENSE else None
        self._pairs: list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]] = []

    def add(self, before: np.ndarray[Any, Any], after: np.ndarray[Any, Any]) -> None:
        """Counts ids, by their codes [n] on both sides."""
        keys = before.astype(np.int64) * self._after + after
        if self._dense is not None:
            self._dense += np.bincount(keys, minlength=len(self._dense))
            return
        self._pairs.append(np.unique(keys, return_counts=True))
        # Put together from time to time, so that there are at most so many again.
        if sum(len(keys) for keys, _ in self._pairs[1:]) > max(_DENSE, len(self._pairs[0][0])):
            self._pairs = [self._merged()]

    def _merged(self) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        keys, places = np.unique(
            np.concatenate([keys for keys, _ in self._pairs]), return_inverse=True
        )
        counts = np.zeros(len(keys), np.int64)
        np.add.at(counts, places, np.concatenate([counts for _, counts in self._pairs]))
        return keys, counts

    def changed(self) -> float:
        """Share of ids that are not in the cluster that theirs has become.

        Each cluster before is matched with at most one after, by the number of ids in both: the
        pair with most ids first, then the next whose clusters are both free (a greedy matching,
        which has at least half the ids of the best one). So renumbered clusters change nothing,
        and the share may be somewhat too large, never too small.
        """
        if self._dense is not None:
            keys = np.flatnonzero(self._dense)
            counts = self._dense[keys]
        elif self._pairs:
            keys, counts = self._merged()
        else:
            return 0.0
        ids = int(counts.sum())
        matched = matched_ids(torch.from_numpy(keys), torch.from_numpy(counts), self._after)
        return 1.0 - matched / ids if ids else 0.0
