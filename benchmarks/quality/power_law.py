"""Synthetic clicks with Criteo's numbers of ids, scaled, most of which are rare."""

from __future__ import annotations

import torch

from cce_torchrec.data.dataset import Dataset, Rows, random_split

CRITEO_IDS = (
    1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194, 27, 14992,
    5461306, 10, 5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572,
)  # fmt: skip
"""Of the 26 categorical features of Criteo's Kaggle data."""
_SCALE = 100
_KEPT = 1000
"""Features of so many ids or fewer are not scaled, and larger ones not below it."""
_COMPRESSED_FROM = 10_000
"""Smaller tables stay full for every method: they take a hundredth of all ids."""
_EXPONENT = 0.8
_LATENT = 8
_LARGE = 2.0
"""Times the numbers of ids of large features: the 5 have as much to say as the 21 others."""
_DATA_SEED = 20231211


def scaled(num_ids: int) -> int:
    """Ids of a feature here that has `num_ids` in Criteo's data."""
    return max(min(num_ids, _KEPT), num_ids // _SCALE)


def power_law(split: int, num_rows: int = 1_000_000, scale: int = 1) -> Dataset:
    """`num_rows` rows; most ids of the large features have few examples.

    An id of rank r occurs in proportion to r^-0.8. Labels are drawn from a planted model: every id
    has a number and a vector of its own, independent of all others, and logits are sums of the
    numbers and of the products of all pairs of vectors. Nothing of it is shared between ids, so
    that no compression finds a structure that was put there for it.

    Args:
        split: seed of the held-out tenth; the data are the same for all.
        scale: divides the numbers of ids further, for tests.
    """
    generator = torch.Generator().manual_seed(_DATA_SEED)
    sizes = [max(2, scaled(n) // scale) for n in CRITEO_IDS]
    ids = torch.stack([_ids(size, num_rows, generator) for size in sizes], dim=1)
    numbers = torch.zeros(num_rows)
    total = torch.zeros(num_rows, _LATENT)
    squares = torch.zeros(num_rows)
    for column, size in enumerate(sizes):
        own = ids[:, column]
        weight = _LARGE if sizes[column] >= _COMPRESSED_FROM // scale else 1.0
        numbers += weight * torch.randn(size, generator=generator)[own]
        vectors = torch.randn(size, _LATENT, generator=generator)[own]
        total += vectors
        squares += vectors.square().sum(1)
    products = (total.square().sum(1) - squares) / 2
    dense = torch.randn(num_rows, 13, generator=generator)
    logits = 2 * numbers / numbers.std() + products / products.std() + dense[:, 0] - 1
    labels = (torch.rand(num_rows, generator=generator) < torch.sigmoid(logits)).float()
    rows = Rows(dense, ids, labels)
    train, validation = random_split(num_rows, 0.1, split)
    features = {f"c{i + 1}": size for i, size in enumerate(sizes)}
    compressed = [name for name, n in features.items() if n >= _COMPRESSED_FROM // scale]
    return Dataset("synthetic", features, compressed, rows.take(train), rows.take(validation))


def _ids(size: int, num_rows: int, generator: torch.Generator) -> torch.Tensor:
    """Ids [num_rows] of a power law, by the inverse of its distribution function."""
    weights = torch.arange(1, size + 1, dtype=torch.float64).pow(-_EXPONENT)
    shares = weights.cumsum(0) / weights.sum()
    uniform = torch.rand(num_rows, generator=generator, dtype=torch.float64)
    return torch.searchsorted(shares, uniform).clamp(max=size - 1)
