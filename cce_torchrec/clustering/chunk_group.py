"""The ranks that do a part of one chunk's clustering together."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

from cce_torchrec.clustering.budget import ChunkShape
from cce_torchrec.collectives import gather, together
from cce_torchrec.kmeans.points import PairPoints

T = TypeVar("T")
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class ChunkGroup:
    """Ranks of a process group, of which one owns the chunk's codebook; or one rank alone.

    Without a group every method does the work of this rank and nothing else, so that a chunk is
    clustered by the same steps on one rank and on many.
    """

    group: dist.ProcessGroup | None = None
    owner: int = 0
    """Rank in the group."""
    device: torch.device = _CPU
    """Of the tensors that the group sends."""

    @property
    def owned(self) -> bool:
        """Whether the codebook is on this rank."""
        return self.group is None or dist.get_rank(self.group) == self.owner

    def agree(self, work: Callable[[], T]) -> T:
        """This rank's `work()`.

        Raises:
            ValueError: on every rank, once it has failed on any.
        """
        return together(work, device=self.device, group=self.group)

    def total(self, number: int) -> int:
        """The sum of every rank's `number`."""
        if self.group is None:
            return number
        return int(self.add_up(torch.tensor([number], device=self.device)))

    def add_up(self, values: torch.Tensor) -> torch.Tensor:
        """`values`, in place the sum of every rank's."""
        if self.group is not None:
            dist.all_reduce(values, group=self.group)
        return values

    def add_up_on_owner(self, values: torch.Tensor) -> torch.Tensor:
        """`values`, in place and on the owner the sum of every rank's."""
        if self.group is not None:
            dist.reduce(values, self._source, group=self.group)
        return values

    def collected(self, own: torch.Tensor) -> torch.Tensor:
        """Every rank's int64 [n] on the owner, one after the other; elsewhere nothing."""
        if self.group is None:
            return own
        lengths = gather(len(own), self.group)

        def room() -> tuple[torch.Tensor, list[torch.Tensor]]:
            # NCCL gathers tensors of one length only.
            padded = own.new_zeros(max(lengths))
            padded[: len(own)] = own
            return padded, [torch.empty_like(padded) for _ in lengths if self.owned]

        padded, parts = self.agree(room)
        dist.gather(padded, parts or None, self._source, group=self.group)
        received = [own[:0], *(part[:n] for part, n in zip(parts, lengths, strict=False))]
        return self.agree(lambda: torch.cat(received))

    def from_owner(self, make: Callable[[], PairPoints], shape: ChunkShape) -> PairPoints:
        """The points that `make` gives on the owner, on every rank bit for bit.

        Codebooks, pairs and counts cross the network, codes do not.

        Raises:
            ValueError: on every rank, if making them fails, or there is no room on any.
        """
        made = self.agree(lambda: [make()] if self.owned else [])
        if self.group is None:
            return made[0]
        header = torch.zeros(3, dtype=torch.int64, device=self.device)
        if made:
            exponent = round(math.log2(made[0].scale))  # a power of two, so this is all of it
            sizes = (len(made[0].a), len(_tensors(made[0])[-1]), exponent)
            header = torch.tensor(sizes, device=self.device)
        dist.broadcast(header, self._source, group=self.group)
        num_points, num_starts, exponent = header.tolist()

        def room() -> PairPoints:
            empty = functools.partial(torch.empty, device=self.device, dtype=torch.int32)
            main, helper = (empty(n, shape.dim) for n in (shape.num_rows, shape.helper_rows))
            a, b = empty(num_points), empty(num_points)
            weights, starts = (empty(n, dtype=torch.int64) for n in (num_points, num_starts))
            return PairPoints.from_integers(main, helper, 2.0**exponent, a, b, weights, starts)

        points = self.agree(lambda: made[0] if made else room())
        for sent in self.agree(lambda: [part.contiguous() for part in _tensors(points)]):
            dist.broadcast(sent, self._source, group=self.group)
        return points

    @property
    def _source(self) -> int:
        """The owner's rank in the job, by which collectives name it."""
        return dist.get_global_rank(self.group, self.owner) if self.group is not None else 0


def _tensors(points: PairPoints) -> tuple[torch.Tensor, ...]:
    """All that points are made of, but for their scale."""
    starts = points.starts(points.num_points)  # different points: never more than there are
    return points.main, points.helper, points.a, points.b, points.weights, starts


ALONE = ChunkGroup()
"""A rank that does all of a chunk's clustering."""
