"""Data that is drawn, for a first run without any download."""

from __future__ import annotations

import torch

from cce_torchrec.data.dataset import Dataset, Rows, random_split


def synthetic(
    seed: int,
    *,
    num_tables: int = 4,
    num_ids: int = 20_000,
    num_rows: int = 200_000,
    num_clusters: int = 64,
) -> Dataset:
    """Power-law ids whose latent vectors fall into clusters; labels drawn from their products."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(num_rows, num_tables, generator=generator).double()
    ids = (float(num_ids) ** uniform).long().clamp(max=num_ids) - 1  # density ~ 1 / rank
    cluster_of = torch.randint(num_clusters, (num_tables, num_ids), generator=generator)
    centers = torch.randn(num_tables, num_clusters, 8, generator=generator)
    latent = torch.stack([centers[t, cluster_of[t, ids[:, t]]] for t in range(num_tables)], dim=1)
    total = latent.sum(1)
    interactions = (total.square() - latent.square().sum(1)).sum(1) / 2
    dense = torch.randn(num_rows, 4, generator=generator)
    logits = interactions / interactions.std() * 2 + dense[:, 0]
    labels = (torch.rand(num_rows, generator=generator) < torch.sigmoid(logits)).float()
    train, validation = random_split(num_rows, 0.1, seed)
    rows = Rows(dense, ids, labels)
    features = {f"feature_{t}": num_ids for t in range(num_tables)}
    return Dataset("synthetic", features, list(features), rows.take(train), rows.take(validation))
