"""A batch between its input distribution and its lookup, which a clustering step may overtake.

Train pipelines distribute a batch, and prefetch its rows, while they train on earlier ones. Where
codes and hashes change meanwhile, by `cluster`, `finalize`, a load or whoever else writes to their
buffers, what was computed from the old ones is computed anew when the batch is looked up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torchrec.distributed.embedding_types import KJTList
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from cce_torchrec.codes.chunk_codes import ChunkCodes
from cce_torchrec.codes.written import Written
from cce_torchrec.lookup.bounds import BoundsCheck
from cce_torchrec.lookup.noting import note

Answered = list[tuple[ChunkCodes, torch.Tensor]]
"""Codes of this rank that note ids, and the positions in them that were asked for."""


@dataclass
class CacheResets:
    """How often the caches of a collection were emptied, with what was prefetched into them."""

    number: int = 0


class BatchInFlight:
    """What was computed from codes for one batch, and from which writes of them.

    Args:
        codes: all that this rank has of the collection's tables.
        fetched_codes: those of them whose tables' codes are fetched from other ranks (ROW_WISE).
        resets: of the collection, as it is now.
    """

    def __init__(
        self,
        codes: Sequence[ChunkCodes],
        fetched_codes: Sequence[ChunkCodes],
        resets: CacheResets,
    ) -> None:
        self._codes, self._fetched_codes, self._resets = codes, fetched_codes, resets
        self.features: KeyedJaggedTensor | None = None
        """The rank's own, where codes were fetched for them (ROW_WISE tables)."""
        self.answered: Answered = []
        """Ids of this rank's part of the tables that any rank looks up by this batch."""
        self.rows: KJTList | None = None
        """Codebook rows, where a pipeline prefetches before it looks up."""
        self._fetched_from, self._rows_from, self._rows_at = Written([]), Written([]), 0

    def fetched(self, features: KeyedJaggedTensor, answered: Answered) -> None:
        """Codes have been fetched for `features`."""
        self.features, self.answered = features, answered
        self._fetched_from = Written(self._counts)

    def prefetched(self, rows: KJTList) -> KJTList:
        """`rows`, which are kept for the lookup."""
        self.rows, self._rows_from, self._rows_at = rows, Written(self._read), self._resets.number
        return rows

    @property
    def _counts(self) -> list[torch.Tensor]:
        """Every rank has these buffers, and whoever writes codes writes them on all."""
        return [codes.count for codes in self._fetched_codes]

    @property
    def _read(self) -> list[torch.Tensor]:
        return [tensor for codes in self._codes for tensor in codes.read_by_lookups]

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

        Every rank decides alike whether to `distribute_again`, which is collective: by buffers that
        all of them have, and that are written on all or on none.

        Args:
            received: what the input distribution brought.
            check: of the collection, which counts ids out of bounds.
            distribute_again: fetches codes for the rank's own features anew, and distributes them.
            expand: gives the rows of what was received.
            forget_prefetched: makes the caches forget where they have the batch's rows.
        """
        if self.rows is not None:
            if self._rows_at == self._resets.number and self._rows_from.is_current(self._read):
                return self.rows
            forget_prefetched()
            # Every bad id is counted once: these were expanded, and counted, for the prefetch.
            self.rows, check = None, check.without_counting()
        if self.features is not None and not self._fetched_from.is_current(self._counts):
            received = distribute_again(self.features, check.without_counting())
        self._note()
        return expand(received, check)

    def _note(self) -> None:
        for codes in self._codes:
            codes.begin_batch()
        # Not when codes are fetched: a clustering step in between starts a new set of seen ids, to
        # which this batch belongs, as it is looked up after the step.
        for codes, positions in self.answered:
            note(codes, positions)

    def record_stream(self, stream: torch.Stream) -> None:
        """Keeps the tensors alive for the work that `stream` has been given."""
        for kept in (self.features, self.rows):
            if kept is not None:
                kept.record_stream(stream)
        for _, positions in self.answered:
            positions.record_stream(stream)
