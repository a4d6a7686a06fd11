"""DPQ (Chen et al., ICML 2020) and MGQE (Kang et al., WWW 2020): codes learned with the table.

Training holds the full table as queries. An embedding is, in each of its parts, the value of the
key that fits the query best; gradients pass through the softmax of the fits (the form DPQ-SX).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from benchmarks.quality.budgets import FLOAT_BYTES, DoesNotFit
from benchmarks.quality.embedder import Tables
from benchmarks.quality.module_embedder import ModuleEmbedder
from benchmarks.quality.packing import code_bits, packed_bytes

_KEYS = 256
"""At most: a step compares every query with every key."""
_HEAD = 0.1
"""Share of the ids, the most frequent ones, that choose from all keys in MGQE, as published."""


class QuantizedTable(nn.Module):
    """A table of `size` ids in `parts` parts of `keys` keys and values."""

    def __init__(
        self,
        size: int,
        dim: int,
        shape: Shape,
        bound: float,
        tail: torch.Tensor | None,
        tail_keys: int,
    ) -> None:
        super().__init__()
        self.shape, width = shape, dim // shape.parts
        # Queries and keys of unit variance tell fits apart from the start; values start as a table.
        self.queries = nn.Parameter(torch.randn(size, dim) / width**0.5)
        self.keys = nn.Parameter(torch.randn(shape.parts, shape.keys, width))
        self.values = nn.Parameter(
            torch.empty(shape.parts, shape.keys, width).uniform_(-bound, bound)
        )
        self.tail = tail
        """Which ids [N] choose from the first `tail_keys` keys; None: none does."""
        self.tail_keys = tail_keys

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Embeddings [n, D]."""
        # Popular ids repeat in a batch, and the comparison with all keys is the cost of a step.
        own, inverse = torch.unique(ids, return_inverse=True)
        if self.tail is None:
            return self._chosen(own, self.shape.keys).index_select(0, inverse)
        tail = self.tail.index_select(0, own)
        groups = [
            ((~tail).nonzero()[:, 0], self.shape.keys),
            (tail.nonzero()[:, 0], self.tail_keys),
        ]
        groups = [(at, keys) for at, keys in groups if len(at)]
        place = torch.cat([at for at, _ in groups]).argsort()
        parts = [self._chosen(own[at], keys) for at, keys in groups]
        return torch.cat(parts).index_select(0, place[inverse])

    def _chosen(self, own: torch.Tensor, count: int) -> torch.Tensor:
        """Embeddings [n, D] of ids that choose from the first `count` keys."""
        queries = self.queries.index_select(0, own).view(len(own), self.shape.parts, -1)
        queries = queries.transpose(0, 1)
        keys, values = self.keys[:, :count], self.values[:, :count]
        with torch.no_grad():
            best = nearest(queries, keys)
        out = values.gather(1, best[:, :, None].expand(-1, -1, values.shape[2]))
        if self.training:
            # Softmax of the fits times the values is attention, whose kernel keeps no fits.
            soft = nn.functional.scaled_dot_product_attention(
                queries[None], keys[None], values[None], scale=1.0
            )[0]
            out = soft + (out - soft).detach()
        return out.transpose(0, 1).reshape(len(own), -1)


def nearest(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Of each of `queries` [parts, n, s] the one of `keys` [parts, K, s] with the largest product.

    In blocks whose products stay in a cache.
    """
    blocks = queries.split(128, 1)
    return torch.cat([torch.bmm(own, keys.transpose(1, 2)).max(2).indices for own in blocks], dim=1)


@dataclass(frozen=True)
class Shape:
    """Parts of an embedding, and keys of each."""

    parts: int
    keys: int

    def bits(self, keys: int | None = None) -> int:
        """Of the codes of an id that chooses from `keys` keys, by default all."""
        return self.parts * code_bits(self.keys if keys is None else keys)


class DifferentiablePQ(ModuleEmbedder):
    """The most bits an id that fit, in 2 to 8 parts; `tail_share` of 1 is DPQ, less is MGQE.

    Args:
        tail_share: of the keys, what all but the most frequent ids choose from.
    """

    def __init__(self, tables: Tables, *, tail_share: float) -> None:
        self.tail_share = tail_share
        super().__init__(tables)

    def module(self, table: int) -> nn.Module:
        """See `ModuleEmbedder`."""
        size, share, dim = self.tables.sizes[table], self.tables.shares[table], self.tables.dim
        shapes = [
            Shape(parts, keys)
            for parts in (2, 4, 8)
            for keys in (4, 8, 16, 32, 64, 128, _KEYS)
            if keys * dim <= share.values(self._code_bytes(size, Shape(parts, keys)))
        ]
        if not shapes:
            raise DoesNotFit(
                f"a table of {size:,} ids has {share.amount:,} bytes, and 4 keys in 2 parts need "
                f"{self._code_bytes(size, Shape(2, 4)) + 4 * dim * FLOAT_BYTES:,}"
            )
        shape = max(shapes, key=lambda s: (s.bits(), s.keys))
        tail = None
        if self.tail_share < 1:
            tail = torch.ones(size, dtype=torch.bool)
            tail[self.tables.counts[table].argsort(descending=True)[: self._head(size)]] = False
        bound = self.tables.bounds[table]
        return QuantizedTable(size, dim, shape, bound, tail, self._tail_keys(shape))

    def _tail_keys(self, shape: Shape) -> int:
        return max(2, int(shape.keys * self.tail_share))

    @staticmethod
    def _head(size: int) -> int:
        return int(_HEAD * size)

    def _code_bytes(self, size: int, shape: Shape) -> int:
        head = self._head(size)
        tail = packed_bytes(size - head, shape.bits(self._tail_keys(shape)))
        return packed_bytes(head, shape.bits()) + tail

    @property
    def parameters(self) -> int:
        """The values: keys and queries are not needed once the codes are."""
        return sum(table.values.numel() for table in self.modules)

    @property
    def stored_bytes(self) -> int:
        """See `Embedder`."""
        pairs = zip(self.tables.sizes, self.modules, strict=True)
        return sum(self._code_bytes(size, table.shape) for size, table in pairs)

    @property
    def training_bytes(self) -> int:
        """See `Embedder`."""
        states = 2 if self.tables.training.optimizer == "adam" else 1
        return FLOAT_BYTES * (1 + states) * sum(p.numel() for p in self.modules.parameters())
