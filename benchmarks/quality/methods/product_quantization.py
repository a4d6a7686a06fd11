"""Product quantisation of a trained full table, by FAISS (Jegou et al., PAMI 2011)."""

from __future__ import annotations

import torch

from benchmarks.quality.budgets import FLOAT_BYTES, DoesNotFit, Share
from benchmarks.quality.embedder import Tables
from benchmarks.quality.methods.hashed import FullTables
from benchmarks.quality.packing import packed_bytes

_BITS = range(1, 9)


class ProductQuantized(FullTables):
    """Trains full tables, and is evaluated as their product quantisation."""

    def __init__(self, tables: Tables) -> None:
        super().__init__(tables)
        pairs = zip(tables.sizes, tables.shares, strict=True)
        self.shapes = [_shape(size, share, tables.dim) for size, share in pairs]
        """Parts and bits of each table."""
        self.quantized = self.rows.weight

    def before_evaluation(self) -> None:
        """Quantises the tables as they are."""
        import faiss

        out = []
        for table, (parts, bits) in zip(
            self.rows.weight.split(self.tables.sizes), self.shapes, strict=True
        ):
            quantizer = faiss.ProductQuantizer(self.tables.dim, parts, bits)
            quantizer.cp.min_points_per_centroid = 1  # tables are small, and it would print so
            values = table.contiguous().numpy()
            quantizer.train(values)
            out.append(torch.from_numpy(quantizer.decode(quantizer.compute_codes(values))))
        self.quantized = torch.cat(out)

    def lookup(self, ids: torch.Tensor, training: bool) -> torch.Tensor:
        """See `Embedder`."""
        return super().lookup(ids, training) if training else self.quantized[ids]

    @property
    def parameters(self) -> int:
        """The codebooks."""
        return sum(2**bits * self.tables.dim for _, bits in self.shapes)

    @property
    def stored_bytes(self) -> int:
        """See `Embedder`."""
        pairs = zip(self.tables.sizes, self.shapes, strict=True)
        return sum(packed_bytes(size, parts * bits) for size, (parts, bits) in pairs)

    @property
    def training_bytes(self) -> int:
        """See `Embedder`."""
        return FLOAT_BYTES * (self.rows.weight.numel() + self.rows.state_values)


def _shape(size: int, share: Share, dim: int) -> tuple[int, int]:
    """Parts and bits that spend most bits on an id, of those most bits a part."""
    fitting = [
        (parts, bits)
        for parts in (1, 2, 4, 8)
        for bits in _BITS
        if 2**bits <= size and 2**bits * dim <= share.values(packed_bytes(size, parts * bits))
    ]
    if not fitting:
        raise DoesNotFit(f"a table of {size:,} ids has {share.amount:,} bytes, less than one bit")
    return max(fitting, key=lambda shape: (shape[0] * shape[1], shape[1]))
