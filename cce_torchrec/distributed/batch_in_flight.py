"""A batch between its input distribution and its lookup, which a clustering step may overtake.

Train pipelines distribute a batch, and prefetch its rows, while they train on earlier ones. Where
`cluster`, `finalize` or a load changes codes and hashes meanwhile, what was computed from the old
ones is computed anew when the batch is looked up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torchrec.distributed.embedding_types import KJTList
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from cce_torchrec.codes.chunk_codes import ChunkCodes
from cce_torchrec.codes.storage import mark_seen
from cce_torchrec.lookup.bounds import BoundsCheck
from cce_torchrec.table import Generation

Answered = list[tuple[ChunkCodes, torch.Tensor]]
"""Codes of this rank that keep bits of seen ids, and the positions in them that were asked for."""


@dataclass
class BatchInFlight:
    """What was computed from codes for one batch, and at which generation of them."""

    generation: Generation
    """Of the collection, as it is now."""
    features: KeyedJaggedTensor | None = None
    """The rank's own, where codes were fetched for them (ROW_WISE tables)."""
    answered: Answered = field(default_factory=list)
    """Ids of this rank's part of the tables that any rank looks up by this batch."""
    rows: KJTList | None = None
    """Codebook rows, where a pipeline prefetches before it looks up."""
    _features_at: int = 0
    _rows_at: int = 0

    def fetched(self, features: KeyedJaggedTensor, answered: Answered) -> None:
        """Codes have been fetched for `features`."""
        self.features, self.answered = features, answered
        self._features_at = self.generation.number

    def prefetched(self, rows: KJTList) -> KJTList:
        """`rows`, which are kept for the lookup."""
        self.rows, self._rows_at = rows, self.generation.number
        return rows

    def current_rows(
        self,
        received: KJTList,
        check: BoundsCheck,
        *,
        distribute_again: Callable[[KeyedJaggedTensor, BoundsCheck], KJTList],
        expand: Callable[[KJTList, BoundsCheck], KJTList],
        forget_prefetched: Callable[[], None],
    ) -> KJTList:
        """Codebook rows by the codes of now: those that were prefetched, or found at this call.

        Every rank decides alike, as codes change on all of them or on none: `distribute_again` is
        collective.

        Args:
            received: what the input distribution brought.
            check: of the collection, which counts ids out of bounds.
            distribute_again: fetches codes for the rank's own features anew, and distributes them.
            expand: gives the rows of what was received.
            forget_prefetched: makes the caches forget where they have the batch's rows.
        """
        now = self.generation.number
        if self.rows is not None:
            if self._rows_at == now:
                return self.rows
            forget_prefetched()
            # Every bad id is counted once: these were expanded, and counted, for the prefetch.
            self.rows, check = None, check.without_counting()
        if self.features is not None and self._features_at != now:
            received = distribute_again(self.features, check.without_counting())
        self._mark_seen()
        return expand(received, check)

    def _mark_seen(self) -> None:
        # Not when codes are fetched: a clustering step in between starts a new set of seen ids, to
        # which this batch belongs, as it is looked up after the step.
        for codes, positions in self.answered:
            if codes.seen is not None and codes.training:
                mark_seen(codes.seen, positions)

    def record_stream(self, stream: torch.Stream) -> None:
        """Keeps the tensors alive for the work that `stream` has been given."""
        for kept in (self.features, self.rows):
            if kept is not None:
                kept.record_stream(stream)
        for _, positions in self.answered:
            positions.record_stream(stream)
