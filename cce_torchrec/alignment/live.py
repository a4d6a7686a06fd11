"""Tables of a model in memory, sharded or not, by the vectors that its lookups give."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torchrec import KeyedJaggedTensor


@dataclass(frozen=True)
class _Reader:
    """A feature that reads ids of a table."""

    feature: str
    key: str
    """In the output."""
    ids: range
    """Of the table, from which the feature's own are counted."""


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
        ValueError: no such table, tables of fewer ids read all its features, or no feature some of
            its ids.
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
        self._readers = _readers_of(found[0], configs)
        features = (name for config in configs for name in config.feature_names)
        self._features = list(dict.fromkeys(features))

    @torch.no_grad()
    def embeddings(self, ids: torch.Tensor) -> torch.Tensor:
        """Vectors [n, embedding_dim] of `ids` [n], on the host."""
        none = torch.zeros(len(ids), dtype=torch.bool)
        own = {
            reader.feature: (ids >= reader.ids.start) & (ids < reader.ids.stop)
            for reader in self._readers
        }
        values = [ids[own[reader.feature]] - reader.ids.start for reader in self._by_feature()]
        # One id a bag, and empty bags of all other features.
        features = KeyedJaggedTensor(
            keys=self._features,
            values=torch.cat(values),
            lengths=torch.cat([own.get(name, none) for name in self._features]).to(ids.dtype),
            weights=torch.ones(len(ids)) if self._is_weighted else None,
            stride=len(ids),
        )
        out = self._collection(features.to(self._device))
        out = out.wait() if hasattr(out, "wait") else out  # of sharded collections
        vectors = torch.empty(len(ids), self.embedding_dim)
        for reader in self._readers:
            at = own[reader.feature]
            found = out[reader.key].values() if isinstance(out, dict) else out.to_dict()[reader.key]
            found = found.detach().cpu()
            # Sequences have the ids of the feature, bags a row for each example.
            vectors[at] = (found if isinstance(out, dict) else found[at]).float()
        return vectors

    def _by_feature(self) -> list[_Reader]:
        """The readers in the order of the features of a batch."""
        return sorted(self._readers, key=lambda reader: self._features.index(reader.feature))


def _readers_of(config: Any, configs: list[Any]) -> list[_Reader]:
    """Features that together read all ids of a table, each once.

    Raises:
        ValueError: there are none.
    """
    ranges: dict[str, range] = getattr(config, "id_ranges", None) or {}
    names = list({ids.start: feature for feature, ids in ranges.items()}.values())
    unread = config.num_embeddings - sum(len(ranges[feature]) for feature in names)
    if ranges and unread:
        raise ValueError(
            f"table {config.name!r}: {unread:,} of its ids are read by no feature (id_ranges), so "
            "that no lookup gives their vectors. Save checkpoints, and use align_checkpoints"
        )
    out = []
    for feature in names or [_feature_of(config, configs)]:
        tables = [other.name for other in configs if feature in other.feature_names]
        # Where several tables read a feature, TorchRec names outputs by both.
        key = f"{feature}@{config.name}" if len(tables) > 1 else feature
        out.append(_Reader(feature, key, ranges.get(feature, range(config.num_embeddings))))
    return out


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
