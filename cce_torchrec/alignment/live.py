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
        collection: an `EmbeddingBagCollection` or `EmbeddingCollection`, plain, CCE or sharded,
            that knows no other features than those of `configs`.
        configs: of all its tables, as `embedding_bag_configs()` (`embedding_configs()`) of the
            unsharded one gives them.
        table: the name of one.
        device: of this rank.
        is_weighted: whether the collection pools by weights, which are 1 here.

    Raises:
        ValueError: no such table, or tables of fewer ids read all its features.
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
        self._feature = _feature_of(found[0], configs)
        readers = [config.name for config in configs if self._feature in config.feature_names]
        # Where several tables read a feature, TorchRec names outputs by both.
        self._key = f"{self._feature}@{table}" if len(readers) > 1 else self._feature
        features = (name for config in configs for name in config.feature_names)
        self._features = list(dict.fromkeys(features))

    @torch.no_grad()
    def embeddings(self, ids: torch.Tensor) -> torch.Tensor:
        """Vectors [n, embedding_dim] of `ids` [n], on the host."""
        own = torch.tensor([[name == self._feature] for name in self._features])
        # One id a bag, and empty bags of all other features.
        features = KeyedJaggedTensor(
            keys=self._features,
            values=ids,
            lengths=own.expand(-1, len(ids)).reshape(-1).to(ids.dtype),
            weights=torch.ones(len(ids)) if self._is_weighted else None,
            stride=len(ids),
        )
        out = self._collection(features.to(self._device))
        out = out.wait() if hasattr(out, "wait") else out  # of sharded collections
        vectors = out[self._key].values() if isinstance(out, dict) else out.to_dict()[self._key]
        return vectors.detach().cpu()


def _feature_of(config: Any, configs: list[Any]) -> str:
    """A feature of the table that no table of fewer ids reads, where ids would be out of bounds.

    Raises:
        ValueError: there is none.
    """
    for feature in config.feature_names:
        smallest = min(
            (other for other in configs if feature in other.feature_names),
            key=lambda other: other.num_embeddings,
        )
        if smallest.num_embeddings >= config.num_embeddings:
            return feature
    raise ValueError(
        f"table {config.name!r}: its feature {feature!r} is read by table {smallest.name!r} too, "
        f"which has {smallest.num_embeddings:,} ids of {config.num_embeddings:,}; looking up the "
        "others would count as out of bounds there. Save checkpoints, and use align_checkpoints"
    )
