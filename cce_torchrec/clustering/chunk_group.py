"""The ranks that do a part of one chunk's clustering together."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist

from cce_torchrec.clustering.budget import ChunkShape
from cce_torchrec.collectives import gather, together
from cce_torchrec.kmeans.points import PairPoints


class HasPoints(Protocol):
    """What is sent for the sake of its points."""

    @property
    def points(self) -> PairPoints:
        """Points over the chunk's codebooks."""


T = TypeVar("T")
P = TypeVar("P", bound=HasPoints)
_CPU = torch.device("cpu")
_FAILED = -1
"""In place of a number of points."""


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

    def together(self, work: Callable[[], T]) -> T:
        """This rank's `work()`, in which it does nothing with the others.

        Raises:
            ValueError: on every rank, once it has failed on any.
        """
        return together(work, device=self.device, group=self.group)

    def all_reduce(self, values: torch.Tensor) -> torch.Tensor:
        """`values`, in place the sum of every rank's."""
        if self.group is not None:
            dist.all_reduce(values, group=self.group)
        return values

    def broadcast(self, values: torch.Tensor) -> None:
        """Makes `values` those of the owner, in place."""
        if self.group is not None:
            dist.broadcast(values, self._source, group=self.group)

    def reduce(self, values: torch.Tensor) -> torch.Tensor:
        """`values`, in place and on the owner the sum of every rank's."""
        if self.group is not None:
            dist.reduce(values, self._source, group=self.group)
        return values

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """Every rank's int64 [n] on the owner, one after the other; elsewhere nothing."""
        if self.group is None:
            return values
        lengths = gather(len(values), self.group)

        def room() -> tuple[torch.Tensor, list[torch.Tensor]]:
            # NCCL gathers tensors of one length only.
            padded = values.new_zeros(max(lengths))
            padded[: len(values)] = values
            return padded, [torch.empty_like(padded) for _ in lengths if self.owned]

        padded, parts = self.together(room)
        dist.gather(padded, parts or None, self._source, group=self.group)
        received = [part[:n] for part, n in zip(parts, lengths, strict=False)]
        return self.together(lambda: torch.cat([values[:0], *received]))

    def send(self, make: Callable[[], P]) -> P:
        """What `make` gives on the owner, whose points the others `receive`, bit for bit.

        Codebooks, pairs and counts cross the network, codes do not.

        Raises:
            ValueError: on every rank, if making it fails, or there is no room on any.
        """
        if self.group is None:
            return make()
        made, failure = None, None
        header = torch.full((3,), _FAILED, device=self.device)
        try:
            made = make()
            exponent = round(math.log2(made.points.scale))  # a power of two, so this is all of it
            sizes = (made.points.num_points, len(_tensors(made.points)[-1]), exponent)
            header = torch.tensor(sizes, device=self.device)
        except Exception as error:  # the others wait for the header, and learn it from that
            failure = error
        self.broadcast(header)

        def ready() -> tuple[P, list[torch.Tensor]]:
            if made is None or failure is not None:
                raise failure or AssertionError("nothing was made")
            return made, [part.contiguous() for part in _tensors(made.points)]

        sent, parts = self.together(ready)
        for part in parts:
            self.broadcast(part)
        return sent

    def receive(self, shape: ChunkShape) -> PairPoints:
        """The points that the owner sends.

        Raises:
            ValueError: as `send`.
        """
        header = torch.empty(3, dtype=torch.int64, device=self.device)
        self.broadcast(header)
        num_points, num_starts, exponent = header.tolist()

        def room() -> PairPoints:
            # Where the owner has failed, there is nothing to make room for, and it says so now.
            points, starts = max(0, num_points), max(0, num_starts)
            empty = functools.partial(torch.empty, device=self.device, dtype=torch.int32)
            return PairPoints.from_integers(
                empty(shape.main_points, shape.dim),
                empty(shape.helper_points, shape.dim),
                2.0**exponent,
                empty(points),
                empty(points),
                empty(points, dtype=torch.int64),
                empty(starts, dtype=torch.int64),
            )

        points = self.together(room)
        for part in _tensors(points):
            self.broadcast(part)
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
