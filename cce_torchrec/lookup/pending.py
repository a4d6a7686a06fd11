"""Lookups that wait for their backward pass, and what becomes of them when codes change before it.

The backward pass of a lookup adds its gradient to the rows that it has read. A clustering step
numbers rows anew, so that a gradient that came after one would train the rows of other ids.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable, Sequence

import torch

from cce_torchrec.codes.chunk_codes import ChunkCodes
from cce_torchrec.codes.written import Written

_REMEDY = (
    "no batch is in flight: after backward(), and with a pipeline that looks up the next batch "
    "(TrainPipelineSemiSync, StagedTrainPipeline with a stage of lookups) once its iterator has "
    "ended. Lookups that are not trained on belong under torch.no_grad(), or delete their output"
)
"""Where codes may be written."""


class PendingLookup:
    """The hook on one lookup's output, which refuses a gradient for rows that are others by now.

    Args:
        tables: names of the collection's CCE tables.
        codes: of them; every rank has the buffers by which writes of codes are known.
        waits: whether its gradient is expected, and has not come yet.
    """

    def __init__(
        self, tables: Iterable[str], codes: Iterable[ChunkCodes], *, waits: bool = True
    ) -> None:
        self._tables, self.waits = tables, waits
        self._written = Written([part.count for part in codes])

    def __call__(self, gradient: torch.Tensor) -> None:
        """Called by autograd.

        Raises:
            ValueError: codes were written since the lookup, naming the tables.
        """
        self.waits = False
        if not self._written.is_unchanged():
            raise ValueError(
                f"tables {sorted(self._tables)}: the codes changed "
                "between a lookup and its backward pass (by cluster, finalize, a load or another "
                "write to their buffers), so its gradient belongs to other rows; nothing was "
                f"trained by it. Codes may change where {_REMEDY}"
            )


class PendingLookups:
    """The lookups of one collection whose backward pass is still to come; see `PendingLookup`."""

    def __init__(self, tables: Sequence[str], codes: Sequence[ChunkCodes]) -> None:
        self._tables, self._codes = tables, codes
        # A hook lives as long as the graph that it is in: lookups that nobody will go backward
        # from are forgotten with it.
        self._hooks: weakref.WeakSet[PendingLookup] = weakref.WeakSet()

    def watched(self, output: torch.Tensor, *, trains: bool) -> torch.Tensor:
        """`output` of a lookup, which is noted if a gradient can come back to it.

        Args:
            output: of TorchRec's lookup.
            trains: whether a gradient is expected, so that a clustering step must not come first;
                one that comes all the same is refused if codes have changed.
        """
        if not output.requires_grad:
            return output
        # A rank without tables gives the same tensor in every step, on which hooks would add up.
        output = output if output.grad_fn is not None else output.view_as(output)
        hook = PendingLookup(self._tables, self._codes, waits=trains)
        output.register_hook(hook)
        self._hooks.add(hook)
        return output

    def check(self) -> None:
        """Refuses a clustering step, which would overtake them.

        Raises:
            ValueError: naming the tables, and how a pipeline is emptied.
        """
        for _ in range(2):
            if any(hook.waits for hook in self._hooks):
                # Graphs that circles of references keep; and TorchRec's exchanges, of which these
                # kept some, are circles themselves.
                gc.collect()
        waiting = sum(hook.waits for hook in self._hooks)
        if waiting:
            raise ValueError(
                f"tables {sorted(self._tables)}: {waiting} of their lookups wait for a backward "
                "pass, whose gradient would train the rows of other ids after the clustering "
                f"step; nothing was clustered. Clustering belongs where {_REMEDY}"
            )
