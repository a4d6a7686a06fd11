"""The models: TorchRec's DLRM, and GMF (sigmoid of a dot product)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torchrec.models.dlrm import DLRM
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from cce_torchrec.config import CCEEmbeddingBagConfig
from cce_torchrec.data import Examples, Rows
from cce_torchrec.modules.embedding_bag_collection import CCEEmbeddingBagCollection


class GMF(nn.Module):
    """Logits [B]: the dot product of the embeddings of two features (He et al., WWW 2017)."""

    def __init__(self, embedding_bag_collection: CCEEmbeddingBagCollection) -> None:
        super().__init__()
        self.embedding_bag_collection = embedding_bag_collection
        self._dim = embedding_bag_collection.embedding_bag_configs()[0].embedding_dim

    def forward(self, dense: torch.Tensor, ids: KeyedJaggedTensor) -> torch.Tensor:
        """Logits [B]; `dense` is not read."""
        pooled = self.embedding_bag_collection(ids).values()
        return (pooled[:, : self._dim] * pooled[:, self._dim :]).sum(1)


class DLRMLogits(nn.Module):
    """Logits [B] of TorchRec's DLRM."""

    def __init__(
        self, embedding_bag_collection: CCEEmbeddingBagCollection, dense_features: int, dim: int
    ) -> None:
        super().__init__()
        self.dlrm = DLRM(
            embedding_bag_collection=embedding_bag_collection,
            dense_in_features=dense_features,
            dense_arch_layer_sizes=[64, dim],
            over_arch_layer_sizes=[128, 64, 1],
        )

    def forward(self, dense: torch.Tensor, ids: KeyedJaggedTensor) -> torch.Tensor:
        """Logits [B]."""
        return self.dlrm(dense, ids).squeeze(1)


def tables(
    dataset: Examples,
    *,
    method: str,
    dim: int,
    num_chunks: int,
    rows: dict[str, int],
    table_bytes: dict[str, int],
    recipe: str,
    seed: int,
    init_bound: float | None,
) -> list[EmbeddingBagConfig]:
    """One table per feature: compressed by `method` to `rows` rows per dimension, or full.

    Args:
        method: cce, ce (hashed codes, no helper), hash (one chunk of that) or full.
        rows: per compressed feature, main + helper rows.
        table_bytes: per compressed feature, what a CCE table may take instead, or empty.
        recipe: of CCE tables.
        init_bound: embeddings start uniform in +-init_bound; None is TorchRec's
            1 / sqrt(num_embeddings).
    """
    out: list[EmbeddingBagConfig] = []
    for name, size in dataset.features.items():
        common: dict[str, Any] = {
            "name": name,
            "num_embeddings": size,
            "embedding_dim": dim,
            "feature_names": [name],
            "weight_init_min": None if init_bound is None else -init_bound,
            "weight_init_max": init_bound,
        }
        if method == "full" or name not in dataset.compressed:
            out.append(EmbeddingBagConfig(**common))
        elif method == "cce":
            common |= {"num_chunks": num_chunks, "seed": seed, "recipe": recipe}
            # In one pass, which is what the recipe goes by.
            common["examples_per_id"] = dataset.num_train / size
            out.append(
                CCEEmbeddingBagConfig.from_bytes(table_bytes[name], **common)
                if table_bytes
                else CCEEmbeddingBagConfig.from_params_per_dim(rows[name], **common)
            )
        else:
            out.append(
                CCEEmbeddingBagConfig(
                    num_rows=rows[name],
                    num_helper_rows=0,
                    learned_codes=False,
                    num_chunks=1 if method == "hash" else num_chunks,
                    seed=seed,
                    **common,
                )
            )
    return out


def keyed_jagged(rows: Rows, features: list[str]) -> KeyedJaggedTensor:
    """One id per row of the features of `rows.ids`, then the bags of those that have several."""
    ones = torch.ones(rows.ids.numel(), dtype=torch.int32, device=rows.ids.device)
    per_key = [len(rows)] * rows.ids.shape[1] + [len(bag.values) for bag in rows.bags]
    return KeyedJaggedTensor(
        keys=features,
        values=torch.cat([rows.ids.t().reshape(-1), *(bag.values for bag in rows.bags)]),
        lengths=torch.cat([ones, *(bag.lengths.int() for bag in rows.bags)]),
        stride=len(rows),
        length_per_key=per_key,  # a step on a GPU would wait to count them
    )
