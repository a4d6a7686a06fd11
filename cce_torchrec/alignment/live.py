"""Tables of a model in memory, sharded or not, by the vectors that its lookups give."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torchrec import KeyedJaggedTensor


class LiveTable:
    """A table of a collection for `align`, read by lookups of one id a bag.

    Of a sharded collection a lookup is collective: all ranks call `align` together, and each looks
    up its share of the ids. Vectors cross the network as in training, a block at a time.

    Args:
        collection: an `EmbeddingBagCollection`, plain, CCE or sharded, that knows no other features
            than those of `configs`.
        configs: of all its tables, as `embedding_bag_configs()` of the unsharded one gives them.
        table: the name of one.
        device: of this rank.
        is_weighted: whether the collection pools by weights, which are 1 here.

    Raises:
        ValueError: no such table.
    """

    def __init__(
        self,
        collection: nn.Module,
        configs: list[Any],
        table: str,
        device: torch.device | str = "cpu",
        *,
        is_weighted: bool = False,
    ) -> None:
        found = [config for config in configs if config.name == table]
        if not found:
            names = [config.name for config in configs]
            raise ValueError(f"there is no table {table!r}; there are {names}")
        self.num_embeddings, self.embedding_dim = found[0].num_embeddings, found[0].embedding_dim
        self._collection, self._device = collection, torch.device(device)
        self._is_weighted = is_weighted
        self._feature = found[0].feature_names[0]
        readers = [config.name for config in configs if self._feature in config.feature_names]
        # Where several tables read a feature, TorchRec names outputs by both.
        self._key = f"{self._feature}@{table}" if len(readers) > 1 else self._feature
        names = (name for config in configs for name in config.feature_names)
        self._features = list(dict.fromkeys(names))

    @torch.no_grad()
    def embeddings(self, ids: torch.Tensor) -> torch.Tensor:
        """Vectors [n, embedding_dim] of `ids` [n], on the host."""
        own = torch.tensor([[name == self._feature] for name in self._features])
        features = KeyedJaggedTensor(
            keys=self._features,
            values=ids,
            lengths=own.expand(-1, len(ids)).reshape(-1).to(ids.dtype),
            weights=torch.ones(len(ids)) if self._is_weighted else None,
            stride=len(ids),
        )
        out = self._collection(features.to(self._device))
        pooled = out if hasattr(out, "to_dict") else out.wait()
        return pooled.to_dict()[self._key].detach().cpu()
